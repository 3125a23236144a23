"""What shells are told: to ask `axlearn completion words LINE`, where LINE is the command up to the cursor.

The answer has a line per word that could stand there in the place of the last one, all of it. One that is complete ends
in a space; to the others something can be added. Where there is no answer, shells complete names of files.
"""

_BASH = r"""# bash completion for axlearn
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
"""

_ZSH = r"""#compdef axlearn
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
"""

_FISH = r"""# fish completion for axlearn
function __axlearn_words
    axlearn completion words (commandline -cp | string collect) 2>/dev/null | string trim --right
end
complete -c axlearn -a '(__axlearn_words)'
"""

SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def how_to() -> str:
    """Returns the line that each shell's start-up file needs."""
    return (
        "    bash  echo 'eval \"$(axlearn completion bash)\"' >> ~/.bashrc\n"
        "    zsh   echo 'eval \"$(axlearn completion zsh)\"' >> ~/.zshrc   (behind compinit)\n"
        "    fish  axlearn completion fish > ~/.config/fish/completions/axlearn.fish"
    )
