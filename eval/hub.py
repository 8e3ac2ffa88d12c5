"""Checks once, within seconds, whether the Hugging Face Hub is reachable; its own client retries for half a minute."""

from __future__ import annotations

import functools
import os
import threading
import urllib.error
import urllib.request

from quant.errors import UserError

TIMEOUT = 3.0
"""longest time of the check in seconds, including name resolution"""


@functools.cache
def hub_answers() -> bool:
    """Return whether the Hub responds; False without a request if HF_HUB_OFFLINE is set."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    answers: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=TIMEOUT).close()
        except urllib.error.HTTPError:
            pass  # an HTTP error is a response
        except OSError:
            return
        answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)  # a socket timeout does not cover name resolution
    thread.start()
    thread.join(TIMEOUT)
    return bool(answers)


def unreachable(what: str) -> UserError:
    """Return the error for something that is neither on this machine nor available from the Hub."""
    return UserError(
        f"{what} is not on this machine and the Hugging Face Hub cannot be reached: "
        "give --data_dir DIR for the data and --model_path DIR (or --from_scratch) for the model"
    )
