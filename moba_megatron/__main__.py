"""`python -m moba_megatron`: the command `moba-megatron`, where it is not on the path."""

from moba_megatron.cli import app

if __name__ == "__main__":
    app()
