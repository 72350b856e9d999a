"""ON WHAT is distilled: the training's sentences, those that are kept aside, and what a batch says of them."""
