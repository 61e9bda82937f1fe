"""Tasks that lmms-eval lacks, a folder each; lmms-eval reads their YAML."""
