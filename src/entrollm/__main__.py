"""`python -m entrollm` is the `entrollm` command."""

from entrollm.cli.main import run

if __name__ == "__main__":
    run()
