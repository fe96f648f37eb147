"""The options of every command. Nothing heavy is imported here, so --help and mistakes are answered at once."""

import argparse
import math
import re
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NoReturn

import aymen_gpt
from aymen_gpt.commands.console import as_typed
from aymen_gpt.errors import UsageError, nearest
from aymen_gpt.training.config import COUNT, OVERRIDABLE, RECIPES, SEEDS, Range, TrainConfig, flag, kind


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an argument; for an unknown one the nearest, and the usage."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it, but what nobody knows is said before what is missing: it may be what is missing."""
        for word in sys.argv[1:] if args is None else args:
            if word == "--":
                break
            name = word.partition("=")[0]
            like_an_option = word.startswith("--") and " " not in word
            if like_an_option and not any(known.startswith(name) for known in self._option_string_actions):
                self.error(f"unrecognized arguments: {word}")
        return super().parse_known_args(args, namespace)

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file)  # argparse's own keeps silent about a full disk

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        known = list(action.choices or [value])
        if value not in known:
            raise argparse.ArgumentError(action, f"{value}: expected {', '.join(known)}{nearest(value, known)}")

    def error(self, message: str) -> NoReturn:
        of_one = re.match(r"argument (?:\S+/)?(-[\w-]+): (.*)", message, re.DOTALL)
        if of_one:
            raise UsageError(f"{of_one[1]} {of_one[2]}")
        unknown = re.match(r"unrecognized arguments: (([^\s=]*)\S*)", message)
        if unknown:
            word, name = unknown.groups()
            by_initials = {initials(option): option for option in self._option_string_actions}
            near = nearest(name, self._option_string_actions)
            near = f"; did you mean {by_initials[name]}?" if name in by_initials else near
            message = (
                f"there is no option {word}{near}" if word.startswith("-") else f"{word} belongs to no option"
            )
        raise UsageError(f"{message}\nusage: {self.usage or self.prog} (--help lists all)")


def initials(option: str) -> str:
    """
    >>> initials("--learning-rate")
    '--lr'
    """
    return "--" + "".join(part[:1] for part in option.strip("-").split("-"))


def parser(description: str, examples: str, usage: str = "") -> argparse.ArgumentParser:
    """An argument parser whose help ends with examples; ``usage`` is what is typed most, after the command."""
    p = Parser(
        usage=as_typed(usage) or None,
        description=description,
        epilog=f"examples:\n{as_typed(examples)}" if examples else None,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=110),
    )
    p.add_argument("--version", action="version", version=f"aymen-gpt {aymen_gpt.__version__}")
    return p


# ---- kinds of values: how argparse reads one, and the word that stands for it in --help --------------


def number(range: Range, *, whole: bool = False, unset: str = "") -> dict[str, Any]:
    """A number in the range, or None for 0 and the word ``unset``."""

    def read(text: str) -> float | None:
        if unset and text in ("0", unset):
            return None
        try:
            value = whole_number(text) if whole else float(text)
        except (ValueError, OverflowError):
            value = math.nan
        if value in range:
            return value
        zero = ", or 0" if unset and 0 not in range else ""
        raise argparse.ArgumentTypeError(f"{text}: expected a {'whole ' if whole else ''}number {range}{zero}")

    return {"type": read, "metavar": "N" if whole else "X"}


def whole_number(text: str) -> int:
    """A whole number as people write large ones: 524288, 524_288, 5e5, 2**19.

    >>> [whole_number(t) for t in ("12", "524_288", "1e8", "2**19")]
    [12, 524288, 100000000, 524288]
    """
    base, power, exponent = text.partition("**")
    if power and not 0 <= int(exponent) <= 64:
        raise ValueError(f"{text} is out of all ranges")
    value = int(base) ** int(exponent) if power else float(text) if "e" in text.lower() else int(text)
    if not math.isfinite(value) or value != int(value):
        raise ValueError(f"{text} is not a whole number")
    return int(value)


def name(text: str) -> str:
    """Text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("'': expected a name")
    return text


def path(text: str) -> Path:
    """A path, which "" is not."""
    return Path(name(text))


def share(text: str) -> tuple[int, int]:
    """ "2/8", the second of eight shares."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text or repr('')}: expected I/N, the I-th of N, from 1/N to N/N")
    return int(match[1]), int(match[2])


def gguf(text: str) -> Path:
    """The path of a GGUF file."""
    if not text.endswith(".gguf"):
        raise argparse.ArgumentTypeError(f"{text}: expected a name that ends with .gguf")
    return Path(text)


NAME: dict[str, Any] = {"type": name, "metavar": "NAME"}
FILE: dict[str, Any] = {"type": path, "metavar": "FILE"}
WHOLE = number(COUNT, whole=True)
MODEL: dict[str, Any] = NAME | {"help": "a run, a checkpoint, gpt2 or another Hub id"}
DEVICE: dict[str, Any] = {"default": "auto", "help": "auto, cpu, mps, cuda or cuda:N [auto]"}

# ---- one parser for each command ---------------------------------------------------------------------


def fineweb() -> argparse.ArgumentParser:
    p = parser(
        "Turn text into shards of GPT-2 tokens, in llm.c's format.",
        """\
  python fineweb.py                                        FineWeb-Edu sample-10BT: 28 GB to read, 20 GB of shards
  python fineweb.py --max-tokens 1e8 --out data/small      its first 100M tokens
  python fineweb.py --source builtin --out data/builtin    the documentation on this machine, no network
  python fineweb.py --source my/texts more.jsonl.gz --out data/mine

Killed or failed? The same command again continues at the last finished shard.
""",
        "python fineweb.py [--source WORD ...] [--out DIR] ...",
    )
    text = p.add_argument_group("text").add_argument
    help = (
        "`hub` (FineWeb-Edu from Hugging Face, the default), `builtin` (documentation installed with Python), "
        "files and folders of .parquet, .jsonl, .jsonl.gz, .jsonl.zst, .txt, .md"
    )
    text("--source", nargs="+", action="extend", type=name, metavar="WORD", help=help)
    text("--text-column", **NAME, help="column or key of the text (default: text, else content)")
    help = "of the dataset on the Hub (default of FineWeb-Edu: a pinned one)"
    text("--revision", type=name, metavar="COMMIT", help=help)
    text("--keep-source", action="store_true", help="keep downloaded files, in DIR/.source")
    help = "leave out rows without usable text, however many there are"
    text("--skip-bad-rows", action="store_true", help=help)
    shards = p.add_argument_group("shards").add_argument
    shards("--out", type=path, default=Path("edu_fineweb10B"), metavar="DIR", help="default: %(default)s")
    in_a_shard = number(Range(1, 2**31 - 1), whole=True)  # what the header of a shard can count
    shards("--shard-tokens", **in_a_shard, default=10**8, help="tokens a shard (default: 1e8)")
    shards("--max-tokens", **number(Range(1, 10**15), whole=True), help="stop after so many tokens (default: all)")
    help = "begin anew; what is in DIR is set aside in DIR/earlier-1, -2, ..."
    shards("--restart", action="store_true", help=help)
    work = p.add_argument_group("work")
    help = "processes (default: one per CPU; 0: only this one)"
    work.add_argument("--workers", **number(Range(0, 10_000), whole=True), help=help)
    encoders = ["gigatoken", "tiktoken"]
    help = "gigatoken or tiktoken: both give the same ids, which is checked [gigatoken where it is installed]"
    work.add_argument("--encoder", choices=encoders, metavar="WORD", default="gigatoken", help=help)
    mode = work.add_mutually_exclusive_group().add_argument
    help = "prepare only the I-th of N shares of the source, on this machine of many"
    mode("--part", type=share, metavar="I/N", help=help)
    mode("--merge", action="store_true", help="make the shards from all N shares in DIR/parts")
    mode("--verify", action="store_true", help="compare every file in DIR with its recorded sha256")
    mode("--repair", action="store_true", help="verify, then rebuild damaged files from their source")
    return p


def pretrain() -> argparse.ArgumentParser:
    p = parser(
        "Pretrain a GPT-2/GPT-3 on token shards. Running the same command again continues the run. "
        "Defaults are those of the gpt2 preset; each preset brings its own.",
        """\
  python pretrain.py                                     the published run: GPT-2 124M, 40B tokens
  torchrun --standalone --nproc_per_node=8 pretrain.py   the same run on 8 GPUs, the same result
  python pretrain.py --preset demo                       a small GPT, minutes on a laptop
  python pretrain.py --preset gpt3-medium --run-dir runs/m                      another size, another folder
  python pretrain.py --plan --gpus 8                     what the published run takes, on 8 of these devices
  python pretrain.py --init-from gpt2 --data data/mine --run-dir runs/tuned --steps 200 --learning-rate 3e-5
  python pretrain.py --n-layer 6 --n-embd 384 --n-head 6 --run-dir runs/small   a shape of your own
  python pretrain.py --config runs/demo/config.json --run-dir runs/again        a run once more, from its record
""",
        "python pretrain.py [--preset NAME] [--data DIR] [--run-dir DIR] ...",
    )
    help = "options by their names from a TOML file, or a run's config.json; flags given here win"
    p.add_argument("--config", **FILE, help=help)
    groups: dict[str, Any] = {}
    for f in fields(TrainConfig):
        title = f.metadata["group"]
        groups[title] = groups.get(title) or p.add_argument_group(title)
        groups[title].add_argument(flag(f.name), dest=f.name, default=argparse.SUPPRESS, **of_config(f))
    help = (
        "auto: continue the run if it has a checkpoint; must: only continue; none: start anew, what is there is "
        "set aside [auto]"
    )
    p.add_argument("--resume", default="auto", choices=("auto", "must", "none"), help=help)
    help = "continue although these differ from the run's"
    p.add_argument("--override-resume", default=[], nargs="+", choices=OVERRIDABLE, help=help)
    plan = p.add_argument_group("planning", "do not train: print what the run would take").add_argument
    plan("--plan", action="store_true", help="parameters, FLOPs, memory by part, steps, disk")
    plan("--probe", action="store_true", help="with --plan: measure 20 updates, for hours and cost")
    help = "plan for another device than this machine's: h100, h200, a100, ..."
    plan("--on", type=str.lower, metavar="GPU", help=help)
    help = "plan for N devices; for several GPUs, find the setting that fits by a step on tensors without numbers"
    plan("--gpus", **number(Range(1, 10**6), whole=True), help=help)
    plan("--gpu-memory", **number(Range(1, 10**5)), help="GB of one GPU [what --on says, else 80]")
    help = "assume this share of the device's peak instead of measuring"
    plan("--mfu", **number(Range(0, 1, without=(0,))), help=help)
    plan("--dollars-per-gpu-hour", **number(Range(0, 10**6)), help="price of one device, for the cost")
    help = "do not train: list the documents that step N reads, with their ids and urls"
    p.add_argument("--show-batch", **WHOLE, help=help)
    return p


def of_config(f: Field[Any]) -> dict[str, Any]:
    """What argparse needs for one field of TrainConfig; its range is checked with all others, by TrainConfig."""
    help, unset, wanted = f.metadata["help"], f.metadata["unset"], kind(f)
    if f.name == "preset":
        return {"metavar": "NAME", "help": f"{help} [gpt2]: {', '.join(RECIPES)}"}
    if f.name == "compile":
        return {"action": argparse.BooleanOptionalAction, "help": help}
    if wanted is bool:
        return {"action": "store_true", "help": help}
    if f.default not in (MISSING, "runs/gpt2"):
        help += f" [{f.default}]" if f.default is not None else f" [{unset}]" if unset else ""
    if wanted is str:
        return {"metavar": "NAME", "help": help}
    return number(f.metadata["range"], whole=wanted is int, unset=unset) | {"help": help}


def hellaswag() -> argparse.ArgumentParser:
    p = parser(
        "Score a model on HellaSwag: four endings, which is likeliest? Chance is 25%.",
        """\
  python hellaswag.py -m runs/gpt2                       a run of pretrain.py: its newest checkpoint
  python hellaswag.py -m gpt2 -d cuda                    OpenAI's GPT-2 124M, from the Hub
  python hellaswag.py -m runs/demo --limit 1000 --json score.json
  torchrun --nproc_per_node=8 hellaswag.py -m runs/gpt2  the same number, on 8 GPUs
  python hellaswag.py --compare a.json b.json            is b better than a, or lucky?
""",
        "python hellaswag.py [-m NAME] [--limit N] [--json FILE] ...",
    )
    help = "a run or checkpoint folder, gpt2, gpt2-medium, gpt2-large, gpt2-xl or another Hub id [gpt2]"
    p.add_argument("-m", "--model", **NAME, default="gpt2", help=help)
    p.add_argument("-d", "--device", **DEVICE)
    help = "auto (bfloat16 where it is fast), float32, bfloat16, float16 [auto]"
    p.add_argument("--dtype", default="auto", help=help)
    protocols = ["completion", "harness", "both"]
    help = "completion: the text as it is, as llm.c scores; harness: as lm-evaluation-harness [both]"
    p.add_argument("--protocol", choices=protocols, metavar="WORD", default="both", help=help)
    help = "score N examples, evenly spaced over the set; 0: all 10,042 [all]"
    p.add_argument("--limit", **number(COUNT, whole=True, unset="all"), help=help)
    p.add_argument("--data", **FILE, help="examples of your own, .jsonl or .parquet [validation set]")
    p.add_argument("--json", **FILE, help="write scores and every answer there")
    help = "score nothing; say whether two files of --json differ by more than luck"
    p.add_argument("--compare", nargs=2, type=path, metavar=("A", "B"), help=help)
    p.add_argument("--batch-tokens", **WHOLE, help="tokens of a batch, fewer take less memory")
    return p


def generate() -> argparse.ArgumentParser:
    p = parser(
        "Continue a text with a trained model.",
        """\
  python generate.py -m runs/demo "The function returns"
  python generate.py -m gpt2 "Hello, I'm a language model," --temperature 0.8 --top-p 0.95 -n 3
  echo "A prompt from a pipe" | python generate.py -m runs/demo -
""",
        "python generate.py -m NAME [PROMPT] [-n N] ...",
    )
    p.add_argument("prompt", nargs="?", default="", help="text to continue; - reads it from standard input [none]")
    p.add_argument("-m", "--model", **MODEL, required=True)
    p.add_argument("-d", "--device", **DEVICE)
    p.add_argument("--max-tokens", **WHOLE, default=200, help="tokens to write [200]")
    p.add_argument(
        "--temperature", **number(Range(0, 1000)), default=0.8, help="0 takes the likeliest token [0.8]"
    )
    p.add_argument("--top-k", **WHOLE, default=50, help="of the N likeliest tokens [50]")
    share = number(Range(0, 1, without=(0,)))
    p.add_argument("--top-p", **share, help="of the likeliest with this probability [all]")
    seeds = number(SEEDS, whole=True)
    p.add_argument("--seed", **seeds, default=0, help="the same seed writes the same text [0]")
    p.add_argument("-n", "--samples", **WHOLE, default=1, help="texts to write [1]")
    return p


def play() -> argparse.ArgumentParser:
    p = parser(
        "Open a page to play with a trained model: text token by token, its probabilities, what surprised the "
        "model, its attention, and what it would have said earlier in its training. Programs reach the same model "
        "at /v1/completions, in OpenAI's way.",
        """\
  aymen-gpt play -m runs/demo                    then open http://127.0.0.1:8000 in a browser
  aymen-gpt play -m gpt2 --port 9000
  aymen-gpt play -m runs/demo --host 0.0.0.0     anybody who can reach this machine may use it: no password
""",
        "aymen-gpt play -m NAME [--port N]",
    )
    p.add_argument("-m", "--model", **MODEL, required=True)
    p.add_argument("-d", "--device", **DEVICE)
    help = "address to listen at [127.0.0.1: this machine only]"
    p.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help=help)
    ports = number(Range(0, 65535), whole=True)
    p.add_argument("--port", **ports, default=8000, help="0: any that is free [8000]")
    return p


def report() -> argparse.ArgumentParser:
    p = parser(
        "Draw the page of a run, or one page that sets several runs beside one another: their losses by tokens, "
        "their scores, and the options in which they differ. A page is one file that loads nothing.",
        """\
  python -m aymen_gpt report runs/demo           draw runs/demo/report.html anew
  python -m aymen_gpt report runs/a runs/b       compare.html: both on the same axes
""",
        "python -m aymen_gpt report RUN ... [--out FILE]",
    )
    p.add_argument("runs", nargs="+", type=path, metavar="RUN", help="a run folder of pretrain.py")
    p.add_argument("--out", **FILE, help="[RUN/report.html, or compare.html for several runs]")
    return p


def export() -> argparse.ArgumentParser:
    p = parser(
        "Write a model as a GGUF file, for llama.cpp, Ollama and LM Studio. llama.cpp and transformers open it at "
        "once; FILE.json says how far their logits are from ours, and a file that is too far off is an error.",
        """\
  aymen-gpt export -m runs/demo --to gguf                               model.gguf, in half precision
  aymen-gpt export -m runs/demo --to gguf --type q8_0 --out demo.gguf
""",
        "aymen-gpt export -m NAME --to gguf [--type TYPE] [--out FILE]",
    )
    p.add_argument("-m", "--model", **MODEL, required=True)
    p.add_argument("--to", choices=["gguf"], required=True, metavar="FORMAT", help="gguf")
    types, help = ["f32", "f16", "q8_0"], "f32, f16 or q8_0, of matrices [f16]"
    p.add_argument("--type", choices=types, default="f16", metavar="TYPE", help=help)
    p.add_argument("--out", **FILE | {"type": gguf}, default=Path("model.gguf"), help="[model.gguf]")
    return p


def push() -> argparse.ArgumentParser:
    p = parser(
        "Put the newest checkpoint of a run on the Hugging Face Hub, with its model card, the loss in it, and the "
        "run's report. One commit: all of it is there, or nothing.",
        """\
  aymen-gpt push -m runs/demo me/demo --dry-run    list what would go, and send nothing
  aymen-gpt push -m runs/demo me/demo --private
""",
        "aymen-gpt push -m RUN OWNER/REPO [--private] [--dry-run]",
    )
    p.add_argument("repo", type=name, metavar="OWNER/REPO", help="is made where there is none")
    p.add_argument("-m", "--model", type=path, required=True, metavar="RUN", help="a run folder of pretrain.py")
    p.add_argument("--private", action="store_true", help="for you and OWNER's members only")
    help = "send what continues the training too: twice the size of the model"
    p.add_argument("--with-optimizer", action="store_true", help=help)
    p.add_argument("--dry-run", action="store_true", help="list what would go, and send nothing")
    return p


def setup() -> argparse.ArgumentParser:
    return parser("Fetch GPT-2's vocabulary and HellaSwag, for work without a network.", "")
