"""Whether the Hugging Face hub is in reach, told in a moment.

Its client tries for a minute, and warns at each try, before it gives up: a misspelt name on a
machine without a network should be told at once.
"""

import ssl
import urllib.error
import urllib.request

from huggingface_hub import constants

_TIMEOUT_S = 10.0


def hub_answers() -> bool:
    """One small request, through the proxy if there is one. False in the hub's offline mode."""
    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # it answers; its client may trust it
    except OSError:
        return False
    return True
