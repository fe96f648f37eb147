"""Train a GPT-2/GPT-3 on token shards (made by fineweb.py). Running a command again continues its run.

python pretrain.py                                              GPT-2 124M, one device
torchrun --standalone --nproc_per_node=8 pretrain.py            the same run on 8 GPUs
python pretrain.py --preset demo                                a small GPT, minutes on a laptop
"""

from aymen_gpt.__main__ import main

if __name__ == "__main__":
    main("pretrain")
