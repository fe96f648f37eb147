"""aymen-gpt play: a page to play with a trained model, and OpenAI's completions API."""

import argparse
import socket
import sys
from functools import partial
from pathlib import Path

from aymen_gpt.commands import console
from aymen_gpt.errors import CannotWrite, UsageError
from aymen_gpt.training.config import Range

EXAMPLES = """\
  aymen-gpt play -m runs/demo                    then open http://127.0.0.1:8000 in a browser
  aymen-gpt play -m gpt2 --port 9000
  aymen-gpt play -m runs/demo --host 0.0.0.0     anybody who can reach this machine may use it: no password
"""
LOCAL = ("127.0.0.1", "localhost", "::1")


def parser() -> argparse.ArgumentParser:
    p = console.parser(
        "Open a page to play with a trained model: text token by token, its probabilities, what surprised the "
        "model, its attention, and what it would have said earlier in its training. Programs reach the same model "
        "at /v1/completions, in OpenAI's way.",
        EXAMPLES,
        "aymen-gpt play -m NAME [--port N]",
    )
    p.add_argument(
        "-m",
        "--model",
        type=console.name,
        required=True,
        metavar="NAME",
        help="a run, a checkpoint, gpt2 or another Hub id",
    )
    p.add_argument("-d", "--device", default="auto", help="auto, cpu, mps, cuda or cuda:N [auto]")
    p.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen at [127.0.0.1: this machine only]",
    )
    p.add_argument(
        "--port",
        type=console.number(Range(0, 65535), whole=True),
        default=8000,
        metavar="N",
        help="0: any that is free [8000]",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        import uvicorn

        from aymen_gpt.play.server import app
    except ModuleNotFoundError as error:
        raise UsageError(f"play needs {error.name}: type pip install 'aymen-gpt[play]'") from None
    from aymen_gpt.play.models import Models
    from aymen_gpt.training.device import choose_device

    served = Models(options.model, choose_device(options.device).place)
    public = options.host not in LOCAL
    if public:
        print(
            f"warning: anybody who can reach {options.host} may use this model: there is no password",
            file=sys.stderr,
        )
    hosts = ["*"] if public else ["127.0.0.1", "localhost", "[::1]"]
    api = app(served, hosts=hosts, curves=partial(curves, served.run))
    config = uvicorn.Config(api, log_level="warning", access_log=False)
    try:
        listening = listen(options.host, options.port)
    except OSError as error:
        raise CannotWrite(
            f"cannot listen at {options.host}:{options.port}: {error.strerror}; try another --port"
        ) from None
    with listening:
        port = listening.getsockname()[1]
        shown = f"[{options.host}]" if ":" in options.host else options.host
        console.show(f"{served.name}: open http://{shown}:{port} (Ctrl-C ends it)")
        uvicorn.Server(config).run(sockets=[listening])
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. OSError when it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def curves(run: Path | None) -> str:
    """The loss of a run as it is now, drawn for wide windows and for phones; "" where there is none."""
    if run is None:
        return ""
    from aymen_gpt.reporting.page import loss_chart
    from aymen_gpt.reporting.run_folder import read_run

    return "".join(f'<div class="{kind}">{svg}</div>' for kind, svg in loss_chart(read_run(run)).drawings)


if __name__ == "__main__":
    console.run(main)
