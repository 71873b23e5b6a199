#!/bin/bash
# netns2.sh up | down | on N CMD... | unplug N | plug N : two "machines" a1 (10.78.0.1) and a2 (10.78.0.2), one cable. root, iproute2 only.
# shellcheck disable=SC2016 # expanded inside the namespace
set -euo pipefail
P=${NETNS_PREFIX:-tr}; NET=${NETNS_NET:-10.78.0}; H=${NETNS_HOSTS:-${TMPDIR:-/tmp}/$P-hosts}
case $1 in
  up) "$0" down
    printf '127.0.0.1 localhost\n%s.1 a1\n%s.2 a2\n' "$NET" "$NET" >"$H"
    ip netns add "$P-a1"; ip netns add "$P-a2"
    ip -n "$P-a1" link add eth0 type veth peer name eth0 netns "$P-a2"
    for i in 1 2; do ip -n "$P-a$i" link set lo up; ip -n "$P-a$i" addr add "$NET.$i/24" dev eth0; ip -n "$P-a$i" link set eth0 up; done ;;
  down) for i in 1 2; do [[ -e /run/netns/$P-a$i ]] || continue
      for p in $(ip netns pids "$P-a$i"); do kill -9 "$p" 2>/dev/null || true; done; ip netns del "$P-a$i"; done; rm -f "$H" ;;
  on) n=a$2; shift 2   # own network, own hostname, own /etc/hosts
    exec ip netns exec "$P-$n" unshare --uts --mount sh -c 'hostname "$1"; [ ! -s "$2" ] || mount --bind "$2" /etc/hosts; shift 2; exec "$@"' sh "$n" "$H" "$@" ;;
  unplug) ip -n "$P-a$2" link set eth0 down ;;
  plug) ip -n "$P-a$2" link set eth0 up ;;
esac
