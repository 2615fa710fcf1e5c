"""Few-shot classification with CLIP: methods, protocol and report."""
