"""One file per family: flavors as data, `config.json` in and out, and the rules that name tensors."""
