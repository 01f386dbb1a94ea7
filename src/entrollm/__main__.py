"""The `entrollm` command, also as `python -m entrollm`."""

import sys


def main() -> None:
    """Run the command line; an interrupt while it is still being imported ends it in one line as well."""
    try:
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
        import signal

        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
