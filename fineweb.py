"""Text to token shards: FineWeb-Edu from the Hugging Face Hub, or any text of your own.

python fineweb.py                                    the published data: sample-10BT -> edu_fineweb10B/
python fineweb.py --source my/texts --out data/mine  parquet, jsonl, jsonl.gz, jsonl.zst or txt
python fineweb.py --help
"""

from aymen_gpt.__main__ import main

if __name__ == "__main__":
    main("fineweb")
