"""aymen-gpt play: a page to play with a trained model, and OpenAI's completions API."""

import argparse
import socket
import sys
from functools import partial
from pathlib import Path

from aymen_gpt.commands import console
from aymen_gpt.errors import CannotWrite, UsageError
from aymen_gpt.reporting.page import loss_chart
from aymen_gpt.reporting.run_folder import read_run
from aymen_gpt.training.device import choose_device

LOCAL = ("127.0.0.1", "localhost", "::1")


def main(options: argparse.Namespace) -> None:
    try:  # what the extra [play] brings
        import uvicorn

        from aymen_gpt.play.models import Models
        from aymen_gpt.play.server import app
    except ModuleNotFoundError as error:
        raise UsageError(f"play needs {error.name}: type pip install 'aymen-gpt[play]'") from None
    served = Models(options.model, choose_device(options.device).place)
    public = options.host not in LOCAL
    if public:
        warning = f"anybody who can reach {options.host} may use this model: there is no password"
        print(f"warning: {warning}", file=sys.stderr)
    hosts = ["*"] if public else ["127.0.0.1", "localhost", "[::1]"]
    api = app(served, hosts=hosts, curves=partial(curves, served.run))
    config = uvicorn.Config(api, log_level="warning", lifespan="off", access_log=False)
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


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. OSError when it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def curves(run: Path | None) -> str:
    """The loss of a run as it is now, drawn for wide windows and for phones; "" where there is none."""
    if run is None:
        return ""
    return "".join(f'<div class="{kind}">{svg}</div>' for kind, svg in loss_chart(read_run(run)).drawings)
