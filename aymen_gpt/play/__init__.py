"""A trained model -> a page to play with it, and OpenAI's completions API. Needs the extra [play]."""
