"""aymen-gpt COMMAND ..., python -m aymen_gpt COMMAND ..., and what the doors at the root of the repository call.

Old Pythons must be able to read this file, to say that they are too old: nothing here may need Python 3.11.
"""

import importlib
import os
import sys

COMMANDS = {
    "fineweb": "text -> token shards",
    "pretrain": "token shards -> a trained GPT",
    "plan": "what a training will take, before it begins",
    "hellaswag": "a model -> its HellaSwag score",
    "generate": "a model and a prompt -> text",
    "play": "a model -> a page to play with it, and OpenAI's API",
    "report": "a run -> its report.html, several runs -> one page with all of them",
    "setup": "fetch the vocabulary and HellaSwag now, for work without a network",
}


def main(name: str = "") -> None:
    """Run a command, by default the one that the first word names, and exit."""
    if not name:
        name = sys.argv[1] if len(sys.argv) > 1 else "--help"
        sys.argv[:2] = [sys.argv[0] + " " + name]
    if sys.version_info < (3, 11):  # noqa: UP036
        old = ".".join(str(part) for part in sys.version_info[:2])
        fail("Python 3.11 or newer is needed, this is " + old, "python3.12")
    try:
        console = importlib.import_module("aymen_gpt.commands.console")
        console.run(lambda: command(name))
    except ModuleNotFoundError as error:
        if error.name is None or "." in error.name or error.name == "aymen_gpt":
            raise
        fail("the package " + error.name + " is not installed for " + sys.executable, "python3")


def command(name: str) -> int:
    """Run a command; its exit code."""
    from aymen_gpt.errors import UsageError, nearest

    if name in ("-h", "--help", "--version"):
        import aymen_gpt

        print("aymen-gpt", aymen_gpt.__version__)
        if name != "--version":
            print("usage: aymen-gpt COMMAND ... (COMMAND --help lists its options)", *lines(), sep="\n")
        return 0
    if name not in COMMANDS:
        raise UsageError(f"there is no command {name}: expected {', '.join(COMMANDS)}{nearest(name, COMMANDS)}")
    if name == "plan":
        sys.argv.insert(1, "--plan")
    module = importlib.import_module("aymen_gpt.commands." + ("pretrain" if name == "plan" else name))
    return module.main()


def lines() -> list:
    return ["  " + name.ljust(10) + " " + what for name, what in COMMANDS.items()]


def fail(why: str, python: str) -> None:
    """End with what is wrong and what to type against it: one line, of the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        root = os.path.relpath(root) if (root + os.sep).startswith(os.getcwd() + os.sep) else root
        inside = sys.prefix == os.path.abspath(os.path.join(root, ".venv"))
        if os.path.exists(os.path.join(root, ".venv", "bin", "activate")) and not inside:
            advice = ". " + os.path.normpath(os.path.join(root, ".venv", "bin", "activate"))
        elif os.path.exists(os.path.join(root, "requirements.txt")):
            advice = python + " -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt -e ."
            advice = advice if root == "." else "cd " + root + " && " + advice
        else:
            advice = sys.executable + " -m pip install " + why.split()[2]
        sys.stderr.write("error: " + why + ": type " + advice + "\n")
    sys.exit(1)


if __name__ == "__main__":
    main()
