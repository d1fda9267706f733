"""The lean language model: config, network, data and tokenizer, Muon, training, artifact."""
