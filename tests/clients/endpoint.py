"""Where the scripts beside this find their endpoints, and what a good answer is."""

import math
import os

URL = os.environ["TACET_URL"]
MODEL = os.environ["TACET_MODEL"]
EMBED_URL = os.environ["TACET_EMBED_URL"]
EMBED_MODEL = os.environ["TACET_EMBED_MODEL"]
TOKEN = os.environ["TACET_TOKEN"]
# Answers that the generating endpoint works on at a time.
RUNNING = int(os.environ["TACET_RUNNING"])

# The model's published continuation.
PROMPT = "Once upon a time"
STORY = ", there was a little girl named Lily."
# Two texts that the embedding model tells apart.
TEXTS = os.environ["TACET_TEXTS"].split("|")


def raises(kind, call):
    """The error of exactly this class that a call ends with."""
    try:
        call()
    except Exception as e:
        assert type(e) is kind, f"{type(e)}: {e}"
        return e
    raise AssertionError(f"no {kind.__name__}")


def same(a, b):
    """Whether two answers are the same unit vector: shares are added in fixed point, so that last digits differ."""
    assert len(a) == len(b) and all(abs(math.hypot(*v) - 1) < 1e-3 for v in (a, b))
    return sum(x * y for x, y in zip(a, b)) > 0.999
