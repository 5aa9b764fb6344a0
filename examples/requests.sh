#!/bin/sh
# The backend of docs/quickstart.md, asked by curl in the ways that HTTP has for it:
#
#     python app.py &
#     sh examples/requests.sh http://127.0.0.1:8000
set -eu
url=${1:-http://127.0.0.1:8000}

ask() { # a text, and more options of curl
    text=$1
    shift
    curl --silent --show-error --fail-with-body --max-time 60 --json "{\"text\": \"$text\"}" "$@" "$url/sentiment"
    echo
}

echo "a request:"
ask "a good day"

echo "the same key twice, as after a cut connection; the code runs once:"
key="Idempotency-Key: \"order-$$-$(date +%s)\""
ask "good" --header "$key"
ask "good" --header "$key" --output /dev/null --write-out '%header{idempotency-replayed}'

echo "submitted, and fetched later:"
result=$(ask "a bad day" --header 'Prefer: respond-async' --output /dev/null --write-out '%header{location}')/result
curl --silent --show-error --fail-with-body --max-time 60 --header 'Prefer: wait=30' "$url$result"
echo

echo "a mistake:"
curl --silent --show-error --write-out ' %{http_code}\n' --json '{"text": ' "$url/sentiment"
