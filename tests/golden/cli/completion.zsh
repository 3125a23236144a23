#compdef axlearn
_axlearn() {
    local line="${(j: :)words[1,CURRENT-1]} ${words[CURRENT]}" candidate
    local -a complete partial
    while IFS= read -r candidate; do
        case "$candidate" in
            "") ;;
            *" ") complete+=("${candidate% }") ;;
            *) partial+=("$candidate") ;;
        esac
    done < <(axlearn completion words "$line" 2>/dev/null)
    if (( $#complete + $#partial == 0 )); then
        _files
        return
    fi
    (( $#complete )) && compadd -Q -- $complete
    (( $#partial )) && compadd -Q -S '' -- $partial
}
compdef _axlearn axlearn
