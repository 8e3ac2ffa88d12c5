"""Whether the Hugging Face Hub answers, asked once and quickly: its own client takes half a minute to give up."""

from __future__ import annotations

import functools
import os
import threading
import urllib.error
import urllib.request

from quant.errors import UserError

TIMEOUT = 3.0
"""seconds that one look at the Hub may take, name resolution included"""


@functools.cache
def hub_answers() -> bool:
    """True if the Hub's server responds at all. HF_HUB_OFFLINE=1 answers for it: no."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    answers: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=TIMEOUT).close()
        except urllib.error.HTTPError:
            pass  # a refusal is an answer
        except OSError:
            return
        answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)  # socket timeouts do not cover name resolution: join does
    thread.start()
    thread.join(TIMEOUT)
    return bool(answers)


def unreachable(what: str) -> UserError:
    """The error for something that is neither on this machine nor within reach."""
    return UserError(
        f"{what} is not on this machine and the Hugging Face Hub cannot be reached: "
        "give --data_dir DIR for the data and --model_path DIR (or --from_scratch) for the model"
    )
