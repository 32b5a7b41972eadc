"""The network, what is computed beside it on the device (targets, loss, decoding), and its files."""
