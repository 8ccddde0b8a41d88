"""What a run is fed: document sources, the tokenizer, packing into sequences, stateful loading."""
