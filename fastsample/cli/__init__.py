"""The command line: `fastsample generate` and `fastsample info`. Its parts are imported when it runs."""
