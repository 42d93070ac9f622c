"""What the commands of `torchweld` do, one file each; optimizer/cli.py declares their options.

They import torch, so the command line imports them only when a command runs.
"""
