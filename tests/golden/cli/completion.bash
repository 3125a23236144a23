# bash completion for axlearn
_axlearn() {
    local line="${COMP_LINE:0:COMP_POINT}" word cut="" candidate
    COMPREPLY=()
    # bash takes words apart at some of these, and replaces only what stands behind the last.
    word="${line##*[[:space:]]}"
    case "$word" in
        *[@=:]*) cut="${word%"${word##*[@=:]}"}" ;;
    esac
    while IFS= read -r candidate; do
        [ -n "$candidate" ] && COMPREPLY+=("${candidate#"$cut"}")
    done < <(axlearn completion words "$line" 2>/dev/null)
}
complete -o nospace -o default -F _axlearn axlearn
