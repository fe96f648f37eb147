"""Continue a text with a trained model.

python generate.py -m runs/gpt2 "Once upon a time"
python generate.py -m gpt2 "Hello, I'm a language model," --temperature 0.8 -n 3
"""

from aymen_gpt.__main__ import main

if __name__ == "__main__":
    main("generate")
