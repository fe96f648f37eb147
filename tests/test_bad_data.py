"""Bad shards end training before it begins: exit code 65, the shard and what is wrong with it, nothing changed."""

import os
import re
import shutil
import subprocess
import warnings
from functools import partial

import numpy as np
import pytest
from conftest import door_command, make_shards
from test_shards import describe_as_fineweb, flip, llmc_bytes

from aymen_gpt.commands.pretrain import build
from aymen_gpt.data import shards
from aymen_gpt.errors import DataError
from aymen_gpt.training.config import resolve
from aymen_gpt.training.device import choose_device
from aymen_gpt.training.distributed import Ranks

TRAIN, VAL = "edufineweb_train_000001.bin", "edufineweb_val_000000.bin"


@pytest.fixture
def folder(tmp_path):
    """Shards with a manifest, as fineweb.py leaves them."""
    folder = make_shards(tmp_path / "shards")
    describe_as_fineweb(folder)
    return folder


def start_training(folder):
    return build(resolve({"preset": "tiny", "data": str(folder)}), choose_device("cpu", "float32"), Ranks())


def replaced(folder, name, content):
    """The folder without its manifest, as other tools make it, with other content in one training shard."""
    (folder / "manifest.json").unlink(missing_ok=True)
    for path in folder.glob("*_train_*"):
        path.unlink()
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        np.save(folder / name, content, allow_pickle=True)


def with_manifest(folder, **values):
    shards.write_manifest(folder, shards.read_manifest(folder) | values)


GOOD = np.arange(50_000, dtype=np.uint16) % 2000
WRONG = GOOD.copy()
WRONG[30_123] = 60_000
NPY = TRAIN.replace(".bin", ".npy")
OTHER = {"name": "other", "vocabulary_sha256": "0", "separator": 50256}
NO_ARRAY = "is not a readable .npy array ("
CONTENTS = [  # row of the table of faults, file, what is in it, what is said of it
    (31, TRAIN, llmc_bytes(WRONG), "has id 60000 at position 30,123 (vocab"),
    (31, NPY, WRONG, "has id 60000 at position 30,123 (vocabulary 50257)"),
    (32, NPY, GOOD.astype("u4") + 70_000, "holds uint32 ids from 70000 to 71999"),
    (32, NPY, GOOD.astype("i8") - 1, "holds int64 ids from -1 to 1998"),
    (32, NPY, np.ones(3), "holds (3,) float64; a shard is a row of"),
    (32, NPY, np.ones((2, 2), np.uint16), "holds (2, 2) uint16; a shard is a row of"),
    (33, NPY, np.array([1, "a"], object), "holds (2,) object; a shard is a row of"),
    (33, NPY, np.array([], np.uint16), "holds (0,) uint16; a shard is a row of"),
    (33, NPY, b"", NO_ARRAY),
    (33, NPY, b"<html>" * 99, NO_ARRAY),
    (33, TRAIN, llmc_bytes(GOOD)[:-4], "has 101,020 bytes; 50,000 tokens need 101,024"),
    (33, TRAIN, llmc_bytes(GOOD)[:-1], "has 101,023 bytes; 50,000 tokens need 101,024"),
    (33, TRAIN, llmc_bytes(GOOD[:3], count=4), "has 1,030 bytes; 4 tokens need 1,032"),
    (33, TRAIN, llmc_bytes([]), "has 1,024 bytes; 0 tokens"),
    (33, TRAIN, llmc_bytes([1], count=-5), "-5 tokens"),
    (33, TRAIN, llmc_bytes(GOOD, version=7), "has version 7; only version 1"),
    (33, TRAIN, b"", "begins with 0, not with llm.c's magic number 20240520"),
    (33, TRAIN, b"<!doctype html>" * 99, "begins with 1868833084, not with llm.c's magic number"),
    (33, "train.bin", b"", "has 0 bytes"),
    (33, "train.bin", b"\0", "has 1 bytes"),
]
REBUILD = ": rebuild it with python fineweb.py --out"
FOLDERS = [  # row, what is done to a folder of ours, what is said of it
    (33, lambda f: (f / TRAIN).unlink(), "000001.bin is missing" + REBUILD),
    (34, lambda f: flip(f / TRAIN, 5000), REBUILD),
    (
        34,
        lambda f: shards.write_shard(f / TRAIN, GOOD[:100]),
        "000001.bin has 100 tokens, manifest.json says 50,000" + REBUILD,
    ),
    (
        34,
        lambda f: shards.write_shard(f / TRAIN.replace("1", "7"), GOOD),
        "holds edufineweb_train_000007.bin, which its manifest",
    ),
    (
        35,
        lambda f: with_manifest(f, tokenizer=OTHER),
        "made with another tokenizer (other, separator 50256) than GPT-2's",
    ),
    (
        35,
        lambda f: with_manifest(f, tokenizer=shards.TOKENIZER | {"separator": 0}),
        "(gpt2, separator 0) than GPT-2's (separator 50256)",
    ),
    (36, lambda f: (f / VAL).unlink(), REBUILD),
    (36, lambda f: shards.write_shard(f / VAL, GOOD[:12]), ": prepare more text, or lower --block-size"),
    (49, lambda f: with_manifest(f, complete=False), "is not finished: run the same fineweb.py command again"),
]
SPOILT = [
    (row, partial(replaced, name=name, content=content), said) for row, name, content, said in CONTENTS
] + FOLDERS


def everything(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("spoil", "message"), [pytest.param(*case, marks=pytest.mark.fault(row)) for row, *case in SPOILT]
)
def test_training_refuses_to_begin(folder, spoil, message):
    spoil(folder)
    before = everything(folder)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        start_training(folder)
    assert (caught.value.exit_code, "\n" in str(caught.value)) == (65, False)
    assert str(folder) in str(caught.value)
    assert everything(folder) == before


@pytest.mark.fault(32)
@pytest.mark.parametrize("kind", [">u2", "uint32", "int64", ">i4"])
def test_other_integers_that_fit_are_trained_on_after_a_notice(folder, kind):
    replaced(folder, NPY, GOOD.astype(kind))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        rows = start_training(folder).train_rows
        assert set(rows.rows(0, rows.rows_per_epoch).ravel().tolist()) == {*range(2000)}
    notices = [str(warning.message) for warning in told if "read into memory as uint16" in str(warning.message)]
    assert notices == [f"shard {folder / NPY} holds {np.dtype(kind)}: read into memory as uint16"]


@pytest.mark.fault(34)
def test_the_command_says_it_in_one_line_and_makes_no_run_folder(door, folder, tmp_path):
    flip(folder / TRAIN, 5000)
    done = door("pretrain.py", "--preset", "tiny", "--data", "shards", "--run-dir", "run")
    assert (done.returncode, done.stdout) == (65, "")
    assert re.fullmatch(
        f"error: shard shards/{TRAIN} has sha256 .{{12}}…, not .{{12}}…: "
        "rebuild it with python fineweb.py --out shards --repair\n",
        done.stderr,
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.fault(33)
@pytest.mark.skipif(
    os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may read all; setpriv forbids it"
)
@pytest.mark.parametrize("name", [TRAIN, "manifest.json", "."])
def test_what_we_may_not_read_is_one_line_with_the_reason(folder, name):
    caps = [f"--{kind}=-dac_override,-dac_read_search" for kind in ("inh-caps", "bounding-set")]
    unprivileged = [] if os.geteuid() else ["setpriv", *caps]
    (folder / name).chmod(0)
    for words in (["fineweb.py", "--verify", "--out"], ["pretrain.py", "--preset", "tiny", "--data"]):
        done = subprocess.run([*unprivileged, *door_command(*words, folder)], capture_output=True, text=True)
        assert done.returncode == 65, done.stderr
        assert re.fullmatch(
            rf"error: cannot read {folder / name}(/manifest.json)?: Permission denied: [^\n]*\n", done.stderr
        )
    (folder / name).chmod(0o700)


class Alone(Ranks):
    """One of several ranks, without the others: its sums are its own share."""

    def sum(self, values):
        return values


@pytest.mark.fault(36)
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_more_ranks_than_validation_rows_measure_the_same_loss(folder, world_size):
    (folder / "manifest.json").unlink()
    shards.write_shard(folder / VAL, GOOD[: 2 * 64 + 1])
    trainer = start_training(folder)
    whole = trainer.validation_loss()
    shares = []
    for rank in range(world_size):
        trainer.ranks = Alone(rank, world_size)
        shares.append(trainer.validation_loss())
    assert sum(shares) == pytest.approx(whole, rel=1e-6)
    assert shares.count(0) == max(world_size - 2, 0)
