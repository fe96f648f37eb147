"""adopt.py: other people's tokens become a folder that training accepts, bytes unchanged, nothing guessed."""

import hashlib
import json
import os
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_shards
from crashes import killed, points
from fake_hub import COMMIT, FakeHub, talk_to
from test_prepare import grow_until_done, quiet, tokens_of, write_jsonl
from test_shards import llmc_bytes

from aymen_gpt.data import adopt, prepare, shards
from aymen_gpt.data.loader import TokenRows
from aymen_gpt.data.prepare import PrepareOptions
from aymen_gpt.errors import DataError, UsageError


def make_tokens(n, seed):
    tokens = np.random.default_rng(seed).integers(0, 50256, n).astype(np.uint16)
    tokens[:: n // 7] = 50256
    return tokens


LISTS = {
    "val_000000": make_tokens(300, 0),
    "train_000001": make_tokens(500, 1),
    "train_000002": make_tokens(400, 2),
}
ALL = [tokens.tolist() for tokens in LISTS.values()]


@pytest.fixture
def llmc(tmp_path):
    """A folder as modded-nanogpt downloads it, with two files beside that are no shards."""
    folder = tmp_path / "fineweb10B"
    folder.mkdir()
    for name, tokens in LISTS.items():
        (folder / f"fineweb_{name}.bin").write_bytes(llmc_bytes(tokens.tolist()))
    (folder / "README.md").touch()
    (folder / ".fineweb_train_000003.bin.tmp").touch()
    return folder


def options_for(folder, **more):
    return PrepareOptions((f"tokens:{folder}",), folder.parent / "out", **more)


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("[!.]*")}


def test_llmc_files_become_shards_as_they_are_and_the_source_stays(llmc):
    before = digest(llmc)
    options = options_for(llmc)
    summary = adopt.adopt(options, quiet)
    shards.check_shards(options.out)
    assert shards.verify(options.out) == {}
    assert tokens_of(options.out) == ALL
    assert digest(llmc) == before
    manifest = json.loads((options.out / "manifest.json").read_text())
    assert set(digest(options.out).values()) > {before[f"fineweb_{name}.bin"] for name in LISTS}
    counts = [(record["tokens"], record["documents"]) for record in manifest["shards"]]
    assert counts == [(len(tokens), tokens.count(50256)) for tokens in ALL]
    origins = [manifest["source"]["files"][record["begin"]["file"]]["name"] for record in manifest["shards"]]
    assert origins == [f"fineweb_{name}.bin" for name in LISTS]
    assert (summary.totals.tokens, summary.totals.documents) == (1200, sum(map(lambda t: t.count(50256), ALL)))
    shard = options.out / "edufineweb_train_000001.bin"
    assert shard.samefile(llmc / "fineweb_train_000001.bin")  # a second name, no second 200 MB
    assert TokenRows(options.out, "train", block_size=8, seed=1).rows(0, 5).shape == (5, 9)
    assert adopt.adopt(options, quiet) == replace(summary, already=True)


def test_a_link_in_the_source_becomes_the_file_that_it_leads_to(llmc, tmp_path):
    for path in list(llmc.glob("*.bin")):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    options = options_for(llmc)
    adopt.adopt(options, quiet)
    assert not any(path.is_symlink() for path in options.out.iterdir())
    assert tokens_of(options.out) == ALL


@pytest.mark.parametrize(("max_tokens", "shards_taken"), [(1, 2), (800, 2), (801, 3)])
def test_max_tokens_ends_training_with_the_shard_that_reaches_it(llmc, max_tokens, shards_taken):
    options = options_for(llmc, max_tokens=max_tokens)
    adopt.adopt(options, quiet)
    assert tokens_of(options.out) == ALL[:shards_taken]


def test_without_hard_links_files_are_copied(llmc, monkeypatch):
    def refuse(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    options = options_for(llmc)
    adopt.adopt(options, quiet)
    assert tokens_of(options.out) == ALL
    assert not (options.out / "edufineweb_train_000001.bin").samefile(llmc / "fineweb_train_000001.bin")


@pytest.mark.parametrize("kind", ["nanogpt", "npy", "int64", ">u2", "llmc without numbers"])
def test_other_formats_are_rewritten_as_llmcs_in_order(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(adopt, "CHUNK", 100)
    folder = tmp_path / "in"
    folder.mkdir()
    val, train = LISTS["val_000000"], np.concatenate([LISTS["train_000001"], LISTS["train_000002"]])
    for split, tokens in (("val", val), ("train", train)):
        if kind == "nanogpt":
            tokens.astype("<u2").tofile(folder / f"{split}.bin")
        elif kind == "llmc without numbers":
            (folder / f"tiny_shakespeare_{split}.bin").write_bytes(llmc_bytes(tokens.tolist()))
        else:
            np.save(
                folder / f"edufineweb_{split}_00000{split == 'train':d}.npy",
                tokens.astype(kind.replace("npy", "<u2")),
            )
    options = options_for(folder, shard_tokens=350)
    adopt.adopt(options, quiet)
    shards.check_shards(options.out)
    found = tokens_of(options.out)
    assert [token for tokens in found for token in tokens] == np.concatenate([val, train]).tolist()
    assert [len(tokens) for tokens in found] == ([300, 900] if "llmc" in kind else [300, 350, 350, 200])


@pytest.mark.fault(31)
@pytest.mark.parametrize("name", ["fineweb_train_000002.bin", "fineweb_train_000002.npy"])
@pytest.mark.parametrize("bad", [50257, -1])
def test_any_id_outside_the_vocabulary_is_found(llmc, name, bad):
    tokens = LISTS["train_000002"].astype(np.int32)
    tokens[123] = bad
    (llmc / "fineweb_train_000002.bin").unlink()
    if name.endswith(".npy"):
        np.save(llmc / name, tokens)
    else:
        (llmc / name).write_bytes(llmc_bytes((tokens % 2**16).tolist()))
    options = options_for(llmc)
    with pytest.raises(DataError, match=rf"{name} has id (65535|50257|-1) at position 123 \(vocabulary 50257\)"):
        adopt.adopt(options, quiet)
    assert len(shards.list_shards(options.out, "train")) == 1
    with pytest.raises(DataError, match="not finished"):
        shards.check_shards(options.out)


@pytest.mark.fault(33)
def test_a_cut_file_is_named_before_anything_is_written(llmc):
    path = llmc / "fineweb_train_000002.bin"
    good = path.read_bytes()
    path.write_bytes(good[:-2])
    options = options_for(llmc)
    with pytest.raises(DataError, match=r"fineweb_train_000002.bin has 1,822 bytes; 400 tokens need 1,824"):
        adopt.adopt(options, quiet)
    path.write_bytes(good)
    adopt.adopt(options, quiet)
    assert tokens_of(options.out) == ALL


def rename(folder, old, new):
    (folder / old).rename(folder / new)


SPOILT = {
    "no val": (
        lambda folder: (folder / "fineweb_val_000000.bin").unlink(),
        DataError,
        "has no val file, and both",
    ),
    "no train": (
        lambda folder: [path.unlink() for path in folder.glob("*train*.bin")],
        DataError,
        "has no train file, and both splits are needed: name one of its files train.bin or edufineweb_train_0000",
    ),
    "two": (
        lambda folder: rename(folder, "fineweb_train_000002.bin", "other_train_000001.bin"),
        DataError,
        "two train files have number 1: ",
    ),
    "version": (
        lambda folder: (folder / "fineweb_val_000000.bin").write_bytes(llmc_bytes([1, 2], version=7)),
        DataError,
        "has version 7; only version 1",
    ),
    "html": (
        lambda folder: (folder / "fineweb_val_000000.bin").write_bytes(b"<!doctype html>" * 100),
        DataError,
        "not with llm.c's magic number",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_folder_that_cannot_be_adopted_is_one_clear_error(llmc, case):
    spoil, error, message = SPOILT[case]
    spoil(llmc)
    with pytest.raises(error, match=message):
        adopt.adopt(options_for(llmc), quiet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": ("tokens:nowhere",)}, "--source tokens:nowhere: no such folder"),
        ({"source": ("tokens:a", "b")}, "cannot be mixed with other sources"),
        ({"source": ("hub-tokens:name",)}, "a dataset is OWNER/NAME"),
        ({"text_column": "text"}, "--text-column is for text"),
        ({"revision": "main"}, "--revision names a commit on the Hub"),
        ({"out": "the source"}, "is the source itself"),
    ],
)
def test_options_that_make_no_sense_are_refused(llmc, change, message):
    change = change | ({"out": llmc} if "out" in change else {})
    with pytest.raises(UsageError, match=message):
        adopt.adopt(replace(options_for(llmc), **change), quiet)


@pytest.mark.parametrize("with_text", [False, True])
def test_token_shards_are_never_mistaken_for_text(tmp_path, with_text):
    folder = make_shards(tmp_path / "shards")
    if with_text:
        write_jsonl(folder / "a.jsonl", ["some text"])
    for word, place in ((folder, folder), (folder / "edufineweb_val_000000.bin", folder)):
        with pytest.raises(UsageError, match=f"take .*--source tokens:{place}"):
            prepare.prepare(PrepareOptions((str(word),), tmp_path / "out"), quiet)


def test_tokens_without_any_separator_are_doubted_aloud(tmp_path):
    for split in ("val", "train"):
        np.arange(100, dtype="<u2").tofile(tmp_path / f"{split}.bin")
    events = []
    adopt.adopt(PrepareOptions((f"tokens:{tmp_path}",), tmp_path / "out"), events.append)
    assert sum("no separator" in event for event in events if isinstance(event, str)) == 2


@pytest.mark.fault(49)
def test_killed_at_any_rename_the_same_command_finishes(llmc, tmp_path):
    (llmc / "fineweb_train_000002.bin").unlink()
    np.save(llmc / "fineweb_train_000002.npy", LISTS["train_000002"])
    options = options_for(llmc, shard_tokens=150)
    adopt.adopt(options, quiet)
    expected = digest(options.out)
    kills = 0
    for point in points("os.replace"):
        again = replace(options, out=tmp_path / f"kill{kills}")
        if not killed(point, lambda again=again: adopt.adopt(again, quiet)):
            break
        kills += 1
        adopt.adopt(again, quiet)
        assert digest(again.out) == expected
        assert not list(again.out.glob(".*.tmp"))
    assert kills == 2 * 2 * len(shards.read_manifest(options.out)["shards"]) + 2


@pytest.mark.fault(22)
def test_a_full_disk_keeps_what_was_copied_and_the_same_command_goes_on(llmc, disk):
    (llmc / "fineweb_train_000002.bin").unlink()
    np.save(llmc / "fineweb_train_000002.npy", LISTS["train_000002"])
    options = options_for(llmc, shard_tokens=150)
    adopt.adopt(options, quiet)
    small = replace(options, out=disk("4k") / "out")  # another file system: no hard links
    assert grow_until_done(disk, small.out, lambda: adopt.adopt(small, quiet)) > 3
    assert digest(small.out) == digest(options.out)


def test_a_resumed_call_mends_what_was_damaged_meanwhile(llmc, tmp_path, monkeypatch):
    adopt.adopt(options_for(llmc), quiet)
    options = replace(options_for(llmc), out=tmp_path / "other")
    monkeypatch.setattr(prepare, "finish", lambda *args: None)
    adopt.adopt(options, quiet)
    monkeypatch.undo()
    (options.out / "edufineweb_val_000000.bin").unlink()
    adopt.adopt(options, quiet)
    assert digest(options.out).keys() == digest(tmp_path / "out").keys()
    assert tokens_of(options.out) == ALL


@pytest.fixture
def hub(tmp_path, monkeypatch):
    files = {f"finewebedu_{name}.bin": llmc_bytes(tokens.tolist()) for name, tokens in LISTS.items()}
    with FakeHub(files | {"README.md": b"# tokens"}) as hub:
        talk_to(hub, monkeypatch, tmp_path / "hf")
        yield hub


def test_tokens_of_the_hub_are_fetched_pinned_and_limited(hub, tmp_path):
    options = PrepareOptions(("hub-tokens:kjj0/finewebedu10B-gpt2",), tmp_path / "out", max_tokens=800)
    adopt.adopt(options, quiet)
    assert tokens_of(options.out) == ALL[:2]
    shards.check_shards(options.out)
    assert hub.count("GET", "train_000002.bin") == 0
    assert not (options.out / ".source").exists()
    source = shards.read_manifest(options.out)["source"]
    assert (source["repo"], source["revision"]) == ("kjj0/finewebedu10B-gpt2", COMMIT)
    assert [file["sha256"] for file in source["files"]] == [
        hashlib.sha256(hub.files[f"finewebedu_{name}.bin"]).hexdigest() for name in LISTS
    ]


def test_a_fetch_that_fails_half_way_goes_on_without_listing_or_finished_files(hub, tmp_path):
    options = PrepareOptions(("hub-tokens:kjj0/finewebedu10B-gpt2",), tmp_path / "out")
    hub.faults["HEAD finewebedu_train_000002.bin"] = ["403", ...]
    with pytest.raises(OSError, match="not found or private"):
        adopt.adopt(options, quiet)
    assert tokens_of(options.out) == ALL[:2]
    hub.faults.clear()
    hub.requests.clear()
    adopt.adopt(options, quiet)
    assert tokens_of(options.out) == ALL
    assert not any("/api/" in request or "000001" in request for request in hub.requests)


@pytest.mark.fault(34)
def test_repair_fetches_only_what_is_damaged(hub, tmp_path):
    options = PrepareOptions(("hub-tokens:kjj0/finewebedu10B-gpt2",), tmp_path / "out")
    adopt.adopt(options, quiet)
    expected = digest(options.out)
    hub.requests.clear()
    (options.out / "edufineweb_train_000002.bin").write_bytes(b"")
    assert adopt.repair(options.out, quiet) == ["edufineweb_train_000002.bin"]
    assert digest(options.out) == expected
    assert hub.count("GET", ".bin") == 1
    assert not (options.out / ".source").exists()
    hub.files["finewebedu_val_000000.bin"] = llmc_bytes([1, 2, 3])
    (options.out / "edufineweb_val_000000.bin").unlink()
    with pytest.raises(OSError, match="sha256"):
        adopt.repair(options.out, quiet)


@pytest.mark.slow
def test_the_commands_adopt_verify_repair_and_train(door, tmp_path):
    for split, n in (("val", 2000), ("train", 9000)):
        make_tokens(n, 1).astype("<u2").tofile(tmp_path / f"{split}.bin")
    done = door("fineweb.py", "--source", "tokens:.", "--out", "d", "--shard-tokens", 5000)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "prepared: d, 3 shards (the first is for validation)"
    assert done.stdout.splitlines()[2] == "tokens     11,000"
    assert (
        "already prepared"
        in door("fineweb.py", "--source", "tokens:.", "--out", "d", "--shard-tokens", 5000).stdout
    )
    trained = door("pretrain.py", "--preset", "tiny", "--data", "d", "--steps", 2, "--run", "run")
    assert trained.returncode == 0, trained.stderr
    (tmp_path / "d/edufineweb_train_000002.bin").unlink()
    assert door("fineweb.py", "--out", "d", "--verify").returncode == 65
    assert door("fineweb.py", "--out", "d", "--repair").stdout.startswith("d: 1 files rebuilt")
    assert door("fineweb.py", "--out", "d", "--verify").returncode == 0
    refused = door("fineweb.py", "--source", "tokens:d", "more.txt", "--out", "e")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "error: --source tokens:d more.txt: tokens cannot be mixed with other sources\n"
