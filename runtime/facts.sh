#!/bin/sh
# llmhost: runtime/facts.sh - what a host is, as one JSON object on stdout; reads, never changes.
#
# Runs over SSH in one round trip, on a bare host, as any user: POSIX sh and awk only, no Python yet.
# Values are raw captures (texts of files and commands); llmhost/hardware.py parses them.
# Argument: the control machine's clock (seconds since 1970), to see how far off this host's clock is.
# LLMHOST_SYSFS replaces /sys, for hosts whose PCI tree is a stand-in; LLMHOST_ROOT stands before the other paths that
# tell of drivers and vendors, for tests; LLMHOST_PATIENCE is how many seconds nvidia-smi has.

export LC_ALL=C
PATH=$PATH:/usr/sbin:/sbin:/usr/lib/wsl/lib
root=${LLMHOST_ROOT:-}
sysfs=${LLMHOST_SYSFS:-$root/sys}
patience=${LLMHOST_PATIENCE:-20}
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
    for path in "$sysfs"/bus/pci/devices/*; do
        [ -r "$path/class" ] || continue
        read -r vendor <"$path/vendor"
        read -r device <"$path/device"
        read -r class <"$path/class"
        case "$vendor $class" in 0x10de*) ;; *" 0x03"????) ;; *) continue ;; esac
        driver=none
        [ -e "$path/driver" ] && driver=$(basename "$(readlink -f "$path/driver")")
        echo "${path##*/} $vendor $device $class $driver"
    done
}

nvswitches() { # bridges of NVIDIA's, else the ports by which NVLink 5 switches are managed
    bridges=$(echo "$devices" | grep -c ' 0x10de 0x.* 0x0680')
    ports=0
    if [ "$bridges" = 0 ] && echo "$devices" | grep -q ' 0x10de 0x.* 0x030[02]'; then
        ports=$(infiniband | elevate xargs -r timeout 20 grep -l SW_MNG | wc -l)
    fi
    echo "$((bridges + ports))"
}

infiniband() { # vital product data of InfiniBand devices; before their driver is there, only the PCI bus knows them
    for path in "$sysfs"/class/infiniband/*/device "$sysfs"/bus/pci/devices/*; do
        [ -e "$path/vpd" ] || continue
        vendor='' class=''
        [ -e "$path/class" ] && read -r vendor <"$path/vendor" && read -r class <"$path/class"
        case "$path $vendor $class" in */class/infiniband/* | *" 0x15b3 0x0207"*) echo "$(readlink -f "$path")/vpd" ;; esac
    done | sort -u
}

secure_boot() { # the variable is four bytes of attributes, then 1 or 0
    od -An -tu1 -j4 "$sysfs/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c" | tr -d ' '
}

mok() { # whether the firmware trusts the key that DKMS signs with: Debian's place for it, then Ubuntu's
    command -v mokutil >/dev/null || return
    for key in "$root/var/lib/dkms/mok.pub" "$root/var/lib/shim-signed/mok/MOK.der"; do
        elevate timeout 10 mokutil --test-key "$key" | grep -q 'is already enrolled' && echo enrolled && break
    done
}

platform() { # what is no plain server: there the driver is not ours to install
    { [ -e "$root/dev/dxg" ] || [ -e "$root/usr/lib/wsl/lib/nvidia-smi" ]; } && echo wsl
    { [ -e "$root/etc/nv_tegra_release" ] || grep -qs nvidia,tegra "$root/proc/device-tree/compatible"; } && echo jetson
    [ -e "$root/etc/dgx-release" ] && echo dgx
    for program in nvidia-uninstall nvidia-installer; do
        [ -e "$root/usr/bin/$program" ] && ! dpkg-query --search "/usr/bin/$program" >/dev/null && echo runfile && break
    done
}

kernels() { # version, and the version and licence of its nvidia module on disk; what removed kernels left is no kernel
    running=$(uname -r)
    for directory in "$root"/lib/modules/*; do
        kernel=${directory##*/}
        [ -e "$root/boot/vmlinuz-$kernel" ] || [ -e "$directory/vmlinuz" ] || [ "$kernel" = "$running" ] || continue
        version=$(modinfo -k "$kernel" -F version nvidia)
        licence=$(modinfo -k "$kernel" -F license nvidia)
        echo "$kernel ${version:--} ${licence:--}"
    done
}

packages() { # name version status, of kernels, NVIDIA's, Docker's, what builds or upgrades; others have no version
    dpkg-query --show --showformat '${Package} ${Version} ${db:Status-Abbrev}\n' \
        'linux-image*' 'linux-headers*' 'linux-generic*' 'linux-virtual*' 'linux-aws*' 'linux-azure*' 'linux-gcp*' \
        'linux-oracle*' 'linux-nvidia*' 'linux-oem*' 'linux-lowlatency*' '*nvidia*' 'cuda-*' libcuda1 \
        'docker*' 'containerd*' runc podman-docker dkms gcc unattended-upgrades | awk 'NF == 3 { print $1, $2, $3 }' | sort -u
}

nvidia() { # the driver in the kernel, the one in user space, and whether llmhost provisions it
    sed 's/^/loaded=/' "$sysfs/module/nvidia/version"
    awk 'NR == 1 { print "modules=" (/Open Kernel Module/ ? "open" : "closed") }' "$root/proc/driver/nvidia/version"
    user_space | sed 's/^/user_space=/'
    sed -n '1s/^\([^ ]*\).*/managed=\1/p' "$root/etc/llmhost/driver"
}

user_space() { # version of the newest package unpacked, else of the library that a .run file left
    echo "$packages" | awk '
        $1 ~ /^(libnvidia-compute|nvidia-utils)(-[0-9].*)?$|^libcuda1$/ && $3 !~ /^.[cH]/ {
            sub(/^[0-9]+:/, "", $2); sub(/-.*/, "", $2); print $2
        }' | sort -V | tail -n 1 | grep . ||
        readlink -f "$root"/usr/lib/*-linux-gnu/libcuda.so.1 | sed -n 's/.*libcuda\.so\.\([0-9]*\.[0-9.]*\)$/\1/p'
}

nvidia_smi() { # nothing where it fails
    [ -e "$root/proc/driver/nvidia/version" ] || command -v nvidia-smi >/dev/null || return
    # A GPU that is lost may hold it in the kernel, where no signal ends it: it is not waited for, and has no pipe of ours.
    # A shell of its own, because a part of this one would keep the standard error that `capture` sets aside.
    answer=$(mktemp -d) && mkfifo "$answer/ended" || return
    sh -c 'timeout "$1" nvidia-smi -q -x >"$2" && echo well' - "$patience" "$answer/said" \
        </dev/null >"$answer/ended" 2>/dev/null &
    [ "$(timeout "$((patience + 2))" cat "$answer/ended")" = well ] && cat "$answer/said"
    rm -rf "$answer"
}

docker_state() {
    [ -d "$root/snap/docker" ] && echo snap=yes
    if command -v docker >/dev/null; then
        echo "server=$(elevate timeout 10 docker version --format '{{.Server.Version}}')"
        echo "compose=$(timeout 10 docker compose version --short)"
    fi
    for program in k3s rke2 kubelet; do
        { [ -e "$root/usr/local/bin/$program" ] || [ -e "$root/usr/bin/$program" ]; } && echo "kubernetes=$program" && break
    done
    command -v nvidia-ctk >/dev/null && echo "toolkit=$(nvidia-ctk --version | awk '/version/ { print $NF; exit }')"
}

apt_entries() { # path uri, of vendors' repositories in use; a user and password in an address are left out
    for file in "$root"/etc/apt/sources.list "$root"/etc/apt/sources.list.d/*.list; do
        [ -r "$file" ] && one_line_uris "$file" | of_vendors "${file#"$root"}"
    done
    for file in "$root"/etc/apt/sources.list.d/*.sources; do
        [ -r "$file" ] && deb822_uris "$file" | of_vendors "${file#"$root"}"
    done
}

one_line_uris() { sed -n 's/^[ 	]*deb\(-src\)\{0,1\}[ 	]*\(\[[^]]*\]\)\{0,1\}[ 	]*\([^ 	]*\).*/\3/p' "$1"; }

deb822_uris() {
    awk 'function stanza() { if (enabled) printf "%s", uris; enabled = 1; uris = "" }
         BEGIN { enabled = 1 }
         /^#/ { next }
         /^[ \t]*$/ { stanza(); next }
         /^[A-Za-z-]+:/ { field = tolower($0); sub(/:.*/, "", field); sub(/^[^:]*:/, "") }
         field == "enabled" && tolower($1) ~ /^(no|false|without|off|disable|0)$/ { enabled = 0 }
         field == "uris" { for (i = 1; i <= NF; i++) uris = uris $i "\n" }
         END { stanza() }' "$1"
}

of_vendors() { # FILE
    sed 's#//[^/]*@#//#' | grep -iE 'nvidia|cuda|docker|graphics-drivers' | sed "s#^#$1 #" | sort -u
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

capture facts_version echo 3
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
devices=$(pci 2>/dev/null)
capture pci echo "$devices"
capture nvswitches nvswitches
capture secure_boot secure_boot
capture mok mok
capture platform platform
capture kernels kernels
packages=$(packages 2>/dev/null)
capture packages echo "$packages"
capture nvidia nvidia
capture nvidia_smi nvidia_smi
capture docker docker_state
capture apt apt_entries
capture listeners listeners
capture installed installed
capture plan cat /etc/llmhost/plan.json
printf '}\n'
