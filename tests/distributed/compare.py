"""`funcsam compare` that saves after every epoch; the second process dies before it trains an epoch for the n-th time.

Arguments: n (0 for never, and then only the second process hears signals), and those of the command.
"""

import itertools
import os
import signal
import sys

from funcsam import cli
from funcsam.studies import comparison, training


def main():
    fatal = int(sys.argv.pop(1))
    calls, advance = itertools.count(1), training.advance

    def mortal(*given):
        if next(calls) == fatal and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return advance(*given)

    if fatal == 0 and os.environ["RANK"] == "0":
        comparison.Comparison.stop = lambda self: None
    training.advance = mortal
    comparison.SAVE_EVERY = 0.0
    cli.main()


if __name__ == "__main__":
    main()
