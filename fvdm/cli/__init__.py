"""The console command `fvdm`: one file per command."""
