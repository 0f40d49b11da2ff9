"""The two ways in which a tokenizer or a chat template cannot be used; caught by the server."""


class TokenizerError(ValueError):
    """A tokenizer that cannot be built. One line that names the file and what is unsupported."""


class ChatTemplateError(ValueError):
    """A chat template that cannot be compiled, or that refuses the messages."""
