"""Run folders as a training leaves them, or as an accident does."""

import json


def write_run(folder, rows=(), *, config=None, status=None, samples=(), hellaswag=None, tail=""):
    """Write a run's files and return its folder; ``rows`` and ``samples`` are objects, one a line.

    Text in place of an object is written as it is, ``tail`` after the rows; what is not given is left alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    objects = {"config.json": config, "status.json": status, "hellaswag.json": hellaswag}
    texts = {name: json.dumps(found) for name, found in objects.items() if found is not None}
    texts |= {name: found for name, found in objects.items() if isinstance(found, str)}
    for name, lines in (("metrics.jsonl", [*rows, tail]), ("samples.jsonl", samples)):
        texts[name] = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    for name, text in texts.items():
        if text:
            (folder / name).write_text(text)
    return folder
