"""EfficientNet in Keras 3, for people who ship image models to phones and edge boards.

The public names stand in `__init__.pyi`. Each is loaded when it is first used: what needs no Keras,
such as judging a file or printing the help of a command, does not wait for it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
