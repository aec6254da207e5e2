"""The command line: one module a command, each with its options as a frozen dataclass and ``main(arguments)``."""
