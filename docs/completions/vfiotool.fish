function _vfiotool
    set -l typed (commandline -opc)
    set -l current (commandline -ct)
    $typed[1] _complete "$current" $typed[2..-1] 2>/dev/null
end
complete -c vfiotool -f -a '(_vfiotool)'
