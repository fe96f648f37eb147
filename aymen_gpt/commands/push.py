"""aymen-gpt push: the newest checkpoint of a run -> a model on the Hugging Face Hub."""

import argparse
import io
import logging
import re
import sys
import tempfile
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from aymen_gpt.commands import console
from aymen_gpt.data.fetch import one_line
from aymen_gpt.errors import AymenError, DataError, NetworkError, UsageError
from aymen_gpt.evaluation.load_model import newest_checkpoint
from aymen_gpt.files import read_json
from aymen_gpt.model.card import for_hub
from aymen_gpt.model.folders import MODEL, TRAINING, model_problem, problem
from aymen_gpt.reporting import plots
from aymen_gpt.reporting.page import write_report
from aymen_gpt.reporting.run_folder import read_run

CONTINUE = set(TRAINING) - set(MODEL)


def main(options: argparse.Namespace) -> None:
    check(options.repo)
    folder = newest_checkpoint(options.model, problem if options.with_optimizer else model_problem)
    files = contents(options.model, folder, options.repo, training=options.with_optimizer)
    sizes = {name: len(it) if isinstance(it, bytes) else it.stat().st_size for name, it in files.items()}
    visible = ", private" if options.private else ""
    console.show(f"{folder} -> {options.repo}{visible}: {len(files)} files, {sum(sizes.values()) / 1e6:,.1f} MB")
    for name, size in sizes.items():
        console.show(f"{size:>15,}  {name}")
    if options.dry_run:
        console.show("nothing was sent: this was a dry run")
    else:
        console.show(
            send(files, options.repo, private=options.private, message=f"{options.model.name}, {folder.name}")
        )


def check(repo: str) -> None:
    """UsageError for what is no OWNER/REPO."""
    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo = ""
    if "/" not in repo:
        raise UsageError("expected OWNER/REPO, such as me/demo: letters, digits, -, _ and . on both sides")


def contents(run_folder: Path, folder: Path, repo: str, *, training: bool) -> dict[str, Path | bytes]:
    """What goes to the Hub by name: files of the checkpoint as they are, and what is made of the run.

    Only what the manifest names: whatever else somebody has put into the folder stays here.
    """
    known = read_json(folder / "manifest.json")["files"]
    files: dict[str, Path | bytes] = {name: folder / name for name in known if training or name not in CONTINUE}
    files["manifest.json"] = folder / "manifest.json"
    try:
        text = (folder / "README.md").read_text("utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the model card {folder / 'README.md'}: {error}; write one") from None
    run, picture = read_run(run_folder), io.BytesIO()
    plots.loss(run).savefig(picture, format="png", dpi=144)
    files["README.md"] = for_hub(text, repo, training=training).encode()
    with tempfile.TemporaryDirectory() as empty:
        report = write_report(run, Path(empty) / "report.html").read_bytes()
    return files | {"loss.png": picture.getvalue(), "report.html": report}


def send(files: dict[str, Path | bytes], repo: str, *, private: bool, message: str) -> str:
    """Make the repository if need be, and one commit with these files; its address.

    What continues a training and is not among the files goes from the repository: it is of another step. A
    UsageError, NetworkError or DataError, of one line, for all that the Hub or its client says against it.
    """
    token = get_token()
    if token is None:
        raise UsageError("no token for the Hub: type hf auth login, or set HF_TOKEN to one that may write")
    if not re.fullmatch(r"[!-~]+", token):
        raise UsageError(
            "the token for the Hub has blanks or letters that no token has: copy it into HF_TOKEN again"
        )
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # of its own tries
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        found = api.model_info(repo)
        if private and not found.private:
            raise UsageError(
                f"{repo} exists and is public: make it private in its settings, or choose another name"
            )
        old = {file.rfilename for file in found.siblings or []} & CONTINUE - files.keys()
        adds = [CommitOperationAdd(name, str(it) if isinstance(it, Path) else it) for name, it in files.items()]
        deletes = [CommitOperationDelete(name) for name in sorted(old)]
        return str(api.create_commit(repo, [*adds, *deletes], commit_message=message).commit_url)
    except AymenError:
        raise
    except OfflineModeIsEnabled:
        raise NetworkError("HF_HUB_OFFLINE is set: unset it to push") from None
    except Exception as error:
        raise refused(error, repo) from error


def refused(error: Exception, repo: str) -> Exception:
    """What the user reads for what the client raised; the error itself where it is a bug."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status == 401:
        return NetworkError(
            "the Hub does not take this token (HTTP 401): type hf auth login, or set HF_TOKEN to another"
        )
    if status in (403, 404):
        return NetworkError(
            f"this token may not write to {repo} (HTTP {status}): check the owner's name, or make a token that may"
        )
    if isinstance(error, ValueError) and "README.md" in str(error):
        return DataError(f"the Hub refuses the model card: {' '.join(str(error).split())[:200]}")
    if not isinstance(cause, OSError | RuntimeError) and not type(cause).__module__.startswith("httpx"):
        return error
    reason = f"HTTP {status}" if status else f"{type(cause).__name__}: {one_line(str(cause))}"
    where = one_line(constants.ENDPOINT)
    return NetworkError(f"cannot push to {repo} at {where}: {reason}; run the same command again")
