"""Fine-tuning a few neurons of any Transformer: those of each task get parameters of their own beside a frozen base."""
