"""What is computed: pure PyTorch. Nothing here knows of stores, flows or servers."""
