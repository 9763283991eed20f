"""What every room uses: errors, files that are replaced whole, threads, the machine, words."""
