"""``python -m scaling``: the command line where its console script is not installed."""

from scaling.cli import main

if __name__ == "__main__":
    main()
