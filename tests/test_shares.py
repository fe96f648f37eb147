"""shares.py: many machines, each with its part, and merged they give the bytes of one machine."""

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from itertools import cycle, islice, takewhile

import pytest
import test_prepare
from conftest import door_command
from crashes import killed, points
from test_prepare import (
    digest,
    grow_until_done,
    make_texts,
    prepared,
    quiet,
    repaired,
    tokens_of,
    write_jsonl,
    write_parquet,
)

from aymen_gpt import files
from aymen_gpt.__main__ import command
from aymen_gpt.data import shards, slices
from aymen_gpt.data.prepare import PrepareOptions
from aymen_gpt.data.shares import Merge, SharePreparation, share_folder
from aymen_gpt.errors import CannotWrite, DataError, NetworkError, UsageError

pytestmark = pytest.mark.slow
hub, hub_options = test_prepare.hub, test_prepare.hub_options  # fixtures


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Files of all kinds, with rows to skip, empty files and parts without rows; about 24,000 tokens."""
    monkeypatch.setattr(slices, "SLICE_BYTES", 6000)
    monkeypatch.setattr(slices, "LARGE", 9000)
    folder = tmp_path / "in"
    write_parquet(folder / "a.parquet", make_texts(170, 1), rows=40)
    write_parquet(folder / "b.parquet", ["", *make_texts(260, 2), " \n"], rows=200)  # a row group that is cut up
    write_jsonl(folder / "c.jsonl", ["", *make_texts(80, 3), "", "long " * 3000, ""])
    (folder / "d.txt").touch()
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(write_jsonl(tmp_path / "e", make_texts(90, 4)).read_bytes()))
    (folder / "f.txt").write_text("\n<|endoftext|>\n".join(make_texts(60, 5)))
    return PrepareOptions(source=(str(folder),), out=tmp_path / "out", shard_tokens=2500, workers=0)


def share_prepared(options, number, count):
    return SharePreparation(options, number, count, quiet).run()


def prepare_shares(options, count):
    return [share_prepared(options, i + 1, count) for i in range(count)]


def merged(options):
    return Merge(options, quiet).run()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_merged_shares_are_the_single_run_manifest_and_all(options, tmp_path, count):
    single = prepared(options)
    parted = replace(options, out=tmp_path / "merged")
    found = prepare_shares(parted, count)
    assert sum(part.totals.documents for part in found) == single.totals.documents
    assert sum(part.totals.tokens > 0 for part in found) >= min(count, 10)
    assert prepare_shares(parted, count) == [replace(part, already=True) for part in found]
    assert merged(parted) == replace(single, folder=parted.out)
    assert digest(parted.out) == digest(options.out)
    assert single.totals.skipped["empty"] >= 5
    shutil.rmtree(parted.out / "parts")
    assert merged(parted) == replace(single, folder=parted.out, already=True) == prepared(parted)


def test_shares_in_a_folder_inside_the_source_are_no_source_and_repair_reads_the_source(options):
    inside = replace(options, out=options.out.parent / "in/tokens")
    prepared(options)
    prepare_shares(inside, 2)
    merged(inside)
    (inside.out / "shard_train_000003.bin").unlink()
    assert repaired(inside.out) == ["shard_train_000003.bin"]
    assert digest(inside.out) == digest(options.out)


def test_shares_are_balanced_by_bytes(tmp_path):
    for name in "ab":
        write_parquet(tmp_path / f"in/{name}.parquet", make_texts(1000, ord(name)), rows=10)
    options = PrepareOptions((str(tmp_path / "in"),), tmp_path / "out", 2500, workers=0)
    tokens = [part.totals.tokens for part in prepare_shares(options, 3)]
    assert max(tokens) < 1.1 * min(tokens)


@pytest.mark.parametrize("change", [{"max_tokens": 7001}, {"max_tokens": 1}, {"shard_tokens": 100_000}])
def test_limits_and_small_corpora_are_cut_as_by_one_machine(options, tmp_path, change):
    options = replace(options, **change)
    parted = replace(options, out=tmp_path / "merged")
    prepare_shares(parted, 2)
    try:
        prepared(options)
    except DataError as error:
        with pytest.raises(DataError, match=str(error)):
            merged(parted)
    else:
        merged(parted)
        assert digest(parted.out) == digest(options.out)


def times_killed(moments, work):
    """How often the work died, at the first moment, then the second... going on each time, until it was done."""
    return sum(takewhile(bool, (killed(moment, work) for moment in moments)))


@pytest.mark.fault(49)
def test_killed_at_any_rename_a_share_and_the_merge_go_on_to_the_same_bytes(options, tmp_path):
    prepared(options)
    parted = replace(options, out=tmp_path / "merged")
    for number in (1, 2):
        later_and_later = islice(points("os.replace"), 0, 100, 3)
        assert 2 < times_killed(later_and_later, lambda n=number: share_prepared(parted, n, 2)) < 33
    soon = cycle(islice(points("os.replace"), 6))
    assert 6 < times_killed(soon, lambda: merged(parted)) < 100
    assert digest(parted.out) == digest(options.out)
    bundles = [shards.read_manifest(share_folder(parted.out, i, 2))["shards"] for i in (1, 2)]
    assert min(map(len, bundles)) >= 3


@pytest.mark.fault(22)
def test_a_disk_that_is_full_loses_nothing_of_a_share_or_a_merge(options, disk):
    prepared(options)
    small = replace(options, out=disk("4k") / "out")
    assert grow_until_done(disk, share_folder(small.out, 1, 1), lambda: share_prepared(small, 1, 1)) > 9
    used = shutil.disk_usage(small.out).used
    assert grow_until_done(disk, small.out, lambda: merged(small), used) > 20
    assert digest(small.out) == digest(options.out)


def test_missing_and_unfinished_parts_are_named(options):
    with pytest.raises(DataError, match=r"parts holds no parts: run python fineweb.py --part 1/N"):
        merged(options)
    share_prepared(options, 2, 4)
    share_prepared(options, 3, 4)
    folder = share_folder(options.out, 3, 4)
    shards.write_manifest(folder, shards.read_manifest(folder) | {"complete": False})
    with pytest.raises(
        DataError, match=r"parts 1/4, 3/4, 4/4 of .*out are not finished: run python fineweb.py --part 1/4"
    ):
        merged(options)
    share_prepared(options, 1, 2)
    with pytest.raises(DataError, match="holds parts of 2 and of 4"):
        merged(options)
    assert not (options.out / "manifest.json").exists()


def test_a_damaged_part_is_named_and_can_be_made_again(options, tmp_path):
    prepared(options)
    parted = replace(options, out=tmp_path / "merged")
    prepare_shares(parted, 2)
    victim = share_folder(parted.out, 2, 2) / "tokens_000001.arrow"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    again = "delete .*2-of-2 and run python fineweb.py --part 2/2 with the same"
    for damage in (lambda: victim.write_bytes(content), victim.unlink):
        damage()
        with pytest.raises(DataError, match=rf"{victim.name} is missing or damaged: {again}"):
            merged(parted)
    shutil.rmtree(victim.parent)
    prepare_shares(parted, 2)
    merged(parted)
    assert digest(parted.out) == digest(options.out)


def test_parts_of_other_options_or_other_files_are_refused(options):
    prepare_shares(options, 2)
    with pytest.raises(UsageError, match=r"1-of-2 was prepared with --shard-tokens 2500, not 9"):
        merged(replace(options, shard_tokens=9))
    with pytest.raises(UsageError, match=r"1-of-2 was prepared with --text-column unset, not x"):
        share_prepared(replace(options, text_column="x"), 1, 2)
    folder = share_folder(options.out, 2, 2)
    manifest = shards.read_manifest(folder)
    for key, value in (("source", {"repo": None}), ("encoder", {"name": "tiktoken", "version": "0"})):
        shards.write_manifest(folder, manifest | {key: value})
        with pytest.raises(DataError, match=rf"2-of-2 has another {key} than .*1-of-2: delete one of them"):
            merged(options)


def test_too_many_bad_rows_are_found_at_the_merge_and_mended_by_its_advice(tmp_path):
    texts = make_texts(300)
    path = write_parquet(tmp_path / "a.parquet", [*texts, None, None, None, None, *texts])
    options = PrepareOptions((str(path),), tmp_path / "out", 1000, workers=0)
    prepare_shares(options, 2)
    with pytest.raises(
        DataError,
        match=r"4 of \d+ rows have .*: a.parquet, slice 6, row 0: null; .* the commands with --part again",
    ):
        merged(options)
    assert merged(replace(options, skip_bad_rows=True)).totals.skipped == {"null": 4}
    write_parquet(path, [*texts, *texts])
    again = replace(options, restart=True)
    prepare_shares(again, 2)
    assert merged(again).totals.documents == 600


@pytest.mark.fault(26)
def test_each_share_is_held_by_one_process(options):
    with files.lock(share_folder(options.out, 2, 2), "--out"):
        share_prepared(options, 1, 2)
        with pytest.raises(CannotWrite, match="2-of-2 is in use"):
            share_prepared(options, 2, 2)


def test_shares_of_the_hub_download_only_their_files(hub_options, hub, tmp_path):
    prepared(hub_options)
    options = replace(hub_options, out=tmp_path / "parted")
    hub.requests.clear()
    share_prepared(options, 2, 2)
    assert hub.count("GET", "000_00000.parquet") == 0
    hub.faults["HEAD 001_00000.parquet"] = ["403", ...]
    with pytest.raises(NetworkError):
        share_prepared(options, 1, 2)
    hub.faults.clear()
    share_prepared(options, 1, 2)
    assert not list(options.out.glob("parts/*/.source"))
    hub.requests.clear()
    merged(options)
    assert hub.requests == []
    assert digest(options.out) == digest(hub_options.out)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "-1/2", "a/b", "1/2/3", ""])
def test_a_part_is_i_of_n(text):
    with pytest.raises(UsageError, match=f"--part {text or repr('')}: expected I/N, the I-th of N"):
        command("fineweb", [f"--part={text}"])


@pytest.mark.fault(49)
def test_the_commands_in_any_order_and_killed_by_kill_minus_nine(tmp_path):
    texts = write_jsonl(tmp_path / "texts.jsonl", make_texts(3000))
    command = ["fineweb.py", "--source", texts, "--shard-tokens", 5000, "--workers", 0, "--out"]

    def run(*words):
        return subprocess.run(door_command(*command, *words), cwd=tmp_path, capture_output=True, text=True)

    assert run("single").returncode == 0
    second = run("d", "--part", "2/2")
    assert second.stdout.splitlines()[0] == "prepared: d/parts/2-of-2, part 2/2"
    assert second.stdout.splitlines()[-1].endswith("the same command with --merge for --part")
    early = run("d", "--merge")
    assert (early.returncode, re.sub(r"\S*python (\S*/)?fineweb", "python fineweb", early.stderr)) == (
        65,
        "error: parts 1/2 of d are not finished: run python fineweb.py --part 1/2 with the same options\n",
    )
    assert run("d", "--part", "1/2").returncode == 0
    dice = random.Random(3)
    for wanted in (1, 4):
        process = subprocess.Popen(door_command(*command, "d", "--merge"), cwd=tmp_path, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list((tmp_path / "d").glob("*.bin"))) < wanted:
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.005))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -9
    assert not json.loads((tmp_path / "d/manifest.json").read_text())["complete"]
    done = run("d", "--merge")
    assert done.stdout.startswith("prepared: d, "), done.stderr
    assert digest(tmp_path / "d") == digest(tmp_path / "single")
    assert tokens_of(tmp_path / "d")
    both = run("d", "--part", "1/2", "--merge")
    assert (both.returncode, "not allowed with" in both.stderr) == (2, True)
