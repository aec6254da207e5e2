#!/bin/sh
# Installs Chromium for the page tests with the system's package manager, unless a browser is there already.
set -eu
cd "$(dirname "$0")/../.."
for candidate in "${CHROMIUM:-}" chromium chromium-browser google-chrome google-chrome-stable chrome \
  "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome" /Applications/Chromium.app/Contents/MacOS/Chromium; do
  if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1; then
    echo "A browser is there: $(command -v "$candidate")"
    exit 0
  fi
done
if ! command -v apt-get >/dev/null 2>&1; then
  echo "error: no browser and no apt-get here; install Chromium or Chrome, or name one in CHROMIUM" >&2
  exit 1
fi
as_root=
[ "$(id -u)" -eq 0 ] || as_root=sudo
if [ -n "$as_root" ] && ! command -v sudo >/dev/null 2>&1; then
  echo "error: installing Chromium needs root: apt-get install chromium" >&2
  exit 1
fi
mkdir -p _build
log=_build/browser.log
echo "Installing Chromium with apt-get (log: $log)"
if ! { $as_root apt-get update && $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } \
  </dev/null >"$log" 2>&1; then
  tail -n 10 "$log" >&2
  echo "error: Chromium could not be installed" >&2
  exit 1
fi
echo "Installed: $(command -v chromium)"
