"""Score a model on HellaSwag, by both protocols, with standard errors.

python hellaswag.py -m runs/gpt2                                a run of pretrain.py: its newest checkpoint
python hellaswag.py -m gpt2 -d cuda                             OpenAI's GPT-2 124M, from the Hub
python hellaswag.py -m runs/demo --limit 1000 --json score.json
"""

from aymen_gpt.__main__ import main

if __name__ == "__main__":
    main("hellaswag")
