"""The command line: ``diffusion-attn``, one file per subcommand."""
