"""The `entrollm` command, also as `python -m entrollm`."""

import signal
import sys


def main() -> None:
    """Run the command line; an interrupt while it is still being imported ends it in one line as well."""
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # by `entrollm.interrupts`; other callers may ignore it
            signal.signal(signal.SIGINT, signal.default_int_handler)
        from entrollm.cli.streams import prepare_streams

        prepare_streams()
        from entrollm.cli.main import run

        run()
    except KeyboardInterrupt:
        if "--json" in sys.argv and sys.stdout is not None:  # it is None if closed, before it is prepared
            sys.stdout.write('{"error": {"type": "KeyboardInterrupt", "message": "interrupted"}}\n')
        if sys.stderr is not None:
            sys.stderr.write("interrupted\n")
        sys.exit(130)
    finally:
        # From here on an interrupt finds nothing to clean up, and Python would report it with a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
