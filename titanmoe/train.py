"""python -m titanmoe.train: parse, build a Trainer, run.

Exit codes: 0 done; 2 the user's mistake; 75 told to stop and saved, run me again; 1 anything else.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from titanmoe.config import ConfigError, help_text, resolve, to_toml, wants_help
from titanmoe.training.errors import TrainingFailedError
from titanmoe.training.stop import StopRequest

DONE, FAILED, MISTAKE, TRY_AGAIN = 0, 1, 2, 75

_DISK_FAILURES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE})


def main(args: Sequence[str] | None = None) -> int:
    args = sys.argv[1:] if args is None else args
    if wants_help(args):
        sys.stdout.write(help_text("python -m titanmoe.train --job.config_file FILE [--section.key=value ...]"))
        return DONE
    stop = StopRequest()  # before the imports of torch, which take seconds
    try:
        return _train(args, stop)
    except ConfigError as error:
        return _tell(str(error), MISTAKE)
    except KeyboardInterrupt:
        return _tell("interrupted; the newest checkpoint, if there is one, is where the next run goes on", FAILED)
    except OSError as error:
        if error.errno not in _DISK_FAILURES:
            raise
        return _tell(f"{error.strerror} ({error.filename})", FAILED)
    finally:
        stop.close()


def _train(args: Sequence[str], stop: StopRequest) -> int:
    resolved = resolve(args)
    config = resolved.config
    # MKL, which multiplies float32 on the CPU, then gives the same bits with any number of threads, so that one process
    # of two threads and two processes of one train the same model. It reads this when torch is imported.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    from titanmoe.metrics.terminal import configure_logging
    from titanmoe.trainer import Trainer

    configure_logging(int(os.environ.get("RANK", "0")), color=not config.metrics.disable_color_printing)
    logger = logging.getLogger("titanmoe")
    for note in resolved.notes:
        logger.info(note)
    if config.job.print_config:
        logger.info("resolved config:\n%s", to_toml(config))
    try:
        return DONE if Trainer(config, stop).train() else TRY_AGAIN
    except TrainingFailedError as error:
        return _tell(str(error), FAILED)


def _tell(message: str, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code


def _run() -> NoReturn:
    code = main()
    if code in (MISTAKE, FAILED):
        # Nothing is left to be done, and what failed may still hold process groups. While Python ends, a thread of
        # theirs that lets go of a tensor is ended too, which aborts the process.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _run()
