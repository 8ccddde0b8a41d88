"""Changing a model before it is distributed: low precision, and what users write themselves."""

from titanmoe.ops.quiet_import import import_quietly

import_quietly("torchao.quantization")
