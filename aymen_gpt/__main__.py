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
    "export": "a model -> a GGUF file for llama.cpp and Ollama, checked",
    "push": "a run -> a model on the Hugging Face Hub, with its card, report and loss",
    "setup": "fetch the vocabulary and HellaSwag now, for work without a network",
}


def main(name: str = "") -> None:
    """Run a command with the words of the command line, by default the one that the first word names, and exit."""
    words = sys.argv[1:]
    if not name:
        name, words = (words or ["--help"])[0], words[1:]
    if sys.version_info < (3, 11):  # noqa: UP036
        old = ".".join(str(part) for part in sys.version_info[:2])
        fail("Python 3.11 or newer is needed, this is " + old, "python3.12")
    try:
        console = importlib.import_module("aymen_gpt.commands.console")
        console.run(lambda: command(name, words))
    except ModuleNotFoundError as error:
        if error.name is None or "." in error.name or error.name == "aymen_gpt":
            raise
        fail("the package " + error.name + " is not installed for " + sys.executable, "python3")


def command(name: str, words: list) -> None:
    """Run a command: read its words, and only then import what does the work."""
    import aymen_gpt
    from aymen_gpt.commands import options
    from aymen_gpt.errors import UsageError, nearest

    if name in ("-h", "--help", "--version"):
        print("aymen-gpt", aymen_gpt.__version__)
        if name != "--version":
            print("usage: aymen-gpt COMMAND ... (COMMAND --help lists its options)")
            print(*("  " + known.ljust(10) + " " + what for known, what in COMMANDS.items()), sep="\n")
        return
    if name not in COMMANDS:
        raise UsageError(f"there is no command {name}: expected {', '.join(COMMANDS)}{nearest(name, COMMANDS)}")
    if name == "plan":
        name, words = "pretrain", ["--plan", *words]
    args = getattr(options, name)().parse_args(words)
    if name == "hellaswag" and args.compare:
        name = "compare"
    importlib.import_module("aymen_gpt.commands." + name).main(args)


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
