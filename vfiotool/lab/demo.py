"""The demonstration."""


def main(kernel: str) -> int:
    raise NotImplementedError(kernel)
