# Prints the first Python on this machine that the project runs on.
for candidate in python3.11 python3.12 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
        command -v "$candidate"
        exit 0
    fi
done
echo "no Python 3.11 or 3.12 found; install one, or name it: make PYTHON=/path/to/python3.12" >&2
exit 1
