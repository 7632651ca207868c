#!/bin/sh
# llmhost: runtime/facts.sh - what a host is, as one JSON object on stdout; reads, never changes.
#
# Runs over SSH in one round trip, on a bare host, as any user: POSIX sh and awk only, no Python yet.
# Values are raw captures (texts of files and commands); llmhost/hardware.py parses them.
# Argument: the control machine's clock (seconds since 1970), to see how far off this host's clock is.
# LLMHOST_SYSFS replaces /sys, for hosts whose PCI tree is a stand-in.

export LC_ALL=C
PATH=$PATH:/usr/sbin:/sbin
sysfs=${LLMHOST_SYSFS:-/sys}
separator='{'

json_string() {
    awk 'BEGIN { printf "\"" }
         NR > 1 { printf "\\n" }
         { gsub(/\\/, "\\\\\\\\"); gsub(/"/, "\\\""); gsub(/\t/, "\\t"); gsub(/[\001-\037\177-\377]/, "?"); printf "%s", $0 }
         END { printf "\"" }'
}

capture() { # NAME COMMAND...: its output, empty where the command fails or is missing
    printf '%s"%s":' "$separator" "$1"
    separator=,
    shift
    "$@" 2>/dev/null | json_string
}

elevate() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

cpu() { # the first processor's block and how many there are
    awk -F'\t*: ' '/^(model name|flags|Features)/ && !seen[$1]++ { print $1 "=" $2 }' /proc/cpuinfo
    echo "count=$(getconf _NPROCESSORS_ONLN)"
}

pci() { # address vendor device class driver, display controllers and bridges of NVIDIA's alike
    for device in "$sysfs"/bus/pci/devices/*; do
        [ -r "$device/class" ] || continue
        driver=none
        [ -e "$device/driver" ] && driver=$(basename "$(readlink -f "$device/driver")")
        echo "${device##*/} $(cat "$device/vendor") $(cat "$device/device") $(cat "$device/class") $driver"
    done | grep -E ' 0x10de | 0x03[0-9a-f]{4} '
}

sockets() { # as `ss -Hltn` prints them, without their holders where those are not to be known
    elevate ss -Hltnp || ss -Hltn && return
    for table in /proc/net/tcp /proc/net/tcp6; do
        while read -r _ address _ state _; do
            [ "$state" = 0A ] && echo "LISTEN 0 0 *:$((0x${address##*:})) *:*"
        done <"$table"
    done
}

listeners() { # address:port pid process unit
    sockets | while read -r _ _ _ address _ process; do
        pid=$(echo "$process" | sed -n 's/.*pid=\([0-9]*\).*/\1/p')
        name=$(echo "$process" | sed -n 's/^users:(("\([^"]*\)".*/\1/p')
        unit=$(sed -n 's#.*/\([^/]*\.service\)\(/.*\)\?$#\1#p' "/proc/${pid:-none}/cgroup" 2>/dev/null | head -n 1)
        echo "$address ${pid:--} ${name:--} ${unit:--}"
    done
}

disks() { # path size available mount-point, of the file system that holds, or will hold, each path
    for path in / /opt/llmhost /var/lib/llmhost /var/lib/llmhost/models; do
        held=$path
        while [ ! -e "$held" ]; do held=$(dirname "$held"); done
        df -P -B1 "$held" | awk -v path="$path" 'NR == 2 { print path, $2, $4, $6 }'
    done
}

installed() { # what an earlier run of llmhost left
    for link in /opt/llmhost/current /opt/llmhost/current-open-webui; do
        echo "${link##*/}=$(basename "$(readlink "$link" 2>/dev/null)")"
    done
    for release in /opt/llmhost/releases/*/release.json; do
        [ -e "$release" ] && echo "release=$(basename "$(dirname "$release")")"
    done
    for manifest in /var/lib/llmhost/models/*/*/.llmhost-manifest.json; do
        [ -e "$manifest" ] && echo "model=$(dirname "$manifest")"
    done
    for unit in vllm.service open-webui.service; do
        echo "$unit=$(systemctl is-active "$unit")"
        file=$(systemctl show "$unit" --property=FragmentPath --value)
        [ -n "$file" ] && ! head -n 1 "$file" | grep -q '^# llmhost: ' && echo "foreign=$unit"
    done
}

capture facts_version echo 2
capture controller_time echo "${1:-}"
capture host_time date +%s
capture user id -un
capture elevates elevate id -u
capture hostname uname -n
capture os_release cat /etc/os-release
capture kernel uname -r
capture machine uname -m
capture init cat /proc/1/comm
capture virtualisation systemd-detect-virt
capture time_synchronised timedatectl show --property NTPSynchronized --value
capture cpu cpu
capture meminfo cat /proc/meminfo
capture disks disks
capture pci pci
capture listeners listeners
capture installed installed
capture plan cat /etc/llmhost/plan.json
printf '}\n'
